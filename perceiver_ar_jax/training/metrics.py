"""Where the numbers of a run go: metrics.jsonl, TensorBoard and the terminal."""

import collections
import datetime
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import rich.progress
from etils import epath

SECONDS_TO_COPY = 60  # TensorBoard's files, to a bucket
RECENT_WINDOWS = 10  # that the ETA is computed from


class MetricsWriter:
    """Appends to `metrics.jsonl`, the source of truth, and to `tensorboard/`.

    A bucket (gs://) cannot append: there the first is rewritten with each line, and the second is
    written locally and copied once a minute.
    """

    def __init__(self, workdir: epath.Path):
        self._path = workdir / "metrics.jsonl"
        text = self._path.read_bytes() if self._path.exists() else b""
        self._text = text[: text.rfind(b"\n") + 1]  # a killed run may have left half a line
        self._path.write_bytes(self._text)
        self._file, self._to_copy = Silent(), None
        self._folder, self._copied = workdir / "tensorboard", time.monotonic()
        if is_remote(workdir):
            self._to_copy = tempfile.TemporaryDirectory()
        else:
            self._file = open(self._path, "ab")  # noqa: SIM115  closed by `close`
        from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(
            str(self._to_copy.name if self._to_copy else self._folder)
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line, {"step": …, "train/loss": …}; numbers that are not finite become strings."""
        line = {name: x if math.isfinite(x) else str(x) for name, x in values.items()}
        encoded = json.dumps({"step": step, **line}).encode() + b"\n"
        if is_remote(self._path):
            self._text += encoded
            self._path.write_bytes(self._text)
        self._file.write(encoded)
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._to_copy and time.monotonic() - self._copied > SECONDS_TO_COPY:
            self._tensorboard.flush()
            self._copy()

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text for TensorBoard."""
        self._tensorboard.add_text(name, f"```\n{text}\n```", step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._tensorboard.close()
        if self._to_copy:
            self._copy()
            self._to_copy.cleanup()

    def _copy(self):
        self._folder.mkdir(parents=True, exist_ok=True)
        for file in epath.Path(self._to_copy.name).iterdir():
            (self._folder / file.name).write_bytes(file.read_bytes())
        self._copied = time.monotonic()


def is_remote(path: epath.Path) -> bool:
    """Whether a path is in a bucket."""
    return "://" in str(path)


class Progress:
    """One live line with ETA on a terminal, plain lines in a pipe."""

    def __init__(self, step: int, total: int):
        self._total = total
        self._recent = collections.deque(maxlen=RECENT_WINDOWS)
        self._console = rich.console.Console(file=sys.stdout, highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[eta]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "train", total=total, completed=step, text="compiling", eta=""
        )
        self._bar.start()

    def took(self, steps: int, seconds: float) -> None:
        """Notes how long a window of steps took."""
        self._recent.append((steps, seconds))

    def update(self, step: int, text: str) -> None:
        """Shows where the run is; in a pipe, on a line of its own."""
        eta = self._eta(step)
        self._bar.update(self._task, completed=step, text=text, eta=eta)
        if not self._console.is_terminal:
            print(f"step {step}/{self._total}  {text}{eta and '  '}{eta}", flush=True)

    def print(self, text: str) -> None:
        """A line above the live one."""
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stops the live line at its last state."""
        self._bar.stop()

    def _eta(self, step):
        """By the steps of the last windows, without compilation and evaluations."""
        if not self._recent or step == self._total:
            return ""
        steps, seconds = map(sum, zip(*self._recent, strict=True))
        left = datetime.timedelta(seconds=round(seconds / steps * (self._total - step)))
        return f"ETA {left}"


class Silent:
    """Accepts every call and does nothing: for processes that do not report."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None
