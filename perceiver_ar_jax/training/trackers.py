"""Experiment trackers beside a run's own files: wandb and trackio, imported when asked for."""

import importlib
import importlib.util
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from perceiver_ar_jax.training.metrics import is_remote

TRACKERS = ("wandb", "trackio")
ID_FILE = "tracking_id"  # of the workdir; a start that resumes continues the same run


def tracker_names(text: str) -> list[str]:
    """The names in "wandb,trackio".

    Raises:
      ValueError: one that is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"trackers has {unknown[0]!r}; there are {' and '.join(TRACKERS)}")
    return names


def check_installed(names: list[str]) -> None:
    """Raises ValueError where a tracker is not installed."""
    for name in names:
        if not importlib.util.find_spec(name):
            raise ValueError(f"trackers={name} needs {name}: pip install {name}")


class Tracker:
    """One tracker of a run; what it is given is what `MetricsWriter` is given.

    A tracker that fails later on is left out with a line on stderr: the run goes on, and
    metrics.jsonl has everything.

    Raises:
      ValueError: the tracker does not start, as without a login.
    """

    def __init__(
        self, name: str, workdir: epath.Path, *, project: str, settings: Mapping[str, Any]
    ):
        identity = _identity(workdir)
        options = {"project": project, "resume": "allow", "config": dict(settings)}
        if name == "wandb":
            folder = {} if is_remote(workdir) else {"dir": str(workdir)}
            options |= {"id": identity, "name": workdir.name, **folder}
        else:  # trackio knows a run by its name
            options |= {"name": f"{workdir.name}-{identity}"}
        try:
            self._run = importlib.import_module(name).init(**options)
        except Exception as error:
            raise ValueError(f"{name} does not start: {_first_line(error)}") from error
        self._name = name

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values under their step."""
        self._try("log", dict(values), step=step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Nothing: the two have no common form for a text, and samples/ has it."""

    def close(self) -> None:
        """Sends what is left."""
        self._try("finish")

    def _try(self, method, *args, **options):
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*args, **options)
        except Exception as error:
            self._run = None
            line = f"{self._name} failed and is left out: {_first_line(error)}"
            print(line, file=sys.stderr, flush=True)


def _identity(workdir: epath.Path) -> str:
    path = workdir / ID_FILE
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
