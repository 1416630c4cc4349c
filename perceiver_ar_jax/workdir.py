"""The folder of a run: one run at a time, always the same model, and what it says of itself."""

import contextlib
import fcntl
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.data.loader import differing_entries
from perceiver_ar_jax.pretrained import CONFIG_FILE, TOKENIZER_FOLDER, write_description

# What may change from one start of a run to the next: how to compute, not what.
HOW_TO_COMPUTE = ("dtype", "remat", "scan_layers", "attention", "max_heads_parallel")


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Makes the folder and holds it for this run.

    Raises:
      ValueError: another run holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {workdir}") from None
        yield


def describe(
    workdir: Path, model: PerceiverARConfig, tokenizer: Any, run: Mapping[str, Any]
) -> list[str]:
    """Writes config, tokenizer and machine to a claimed folder.

    Returns:
      A line for each setting that differs from the run's last start.

    Raises:
      ValueError: the folder is that of another model or tokenizer; says how they differ.
    """
    changed = []
    if (workdir / CONFIG_FILE).is_file():
        old = json.loads((workdir / CONFIG_FILE).read_text())
        fields = {name: x for name, x in model.to_dict().items() if name not in HOW_TO_COMPUTE}
        different = differing_entries({name: old["model"].get(name) for name in fields}, fields)
        if old["tokenizer_sha256"] != tokenizer.sha256:
            different.append("the tokenizer's sha256")
        if different:
            raise ValueError(f"{workdir} belongs to another model: {'; '.join(different)}")
        changed = differing_entries(_flat(old.get("run", {})), _flat(run))
    (workdir / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    tokenizer.save(workdir / TOKENIZER_FOLDER)
    write_description(workdir, model, tokenizer_sha256=tokenizer.sha256, run=run)
    environment = {
        "command": sys.argv,
        "perceiver_ar_jax": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
        "host": platform.node(),
    }
    (workdir / "env.json").write_text(json.dumps(environment, indent=2) + "\n")
    return changed


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
