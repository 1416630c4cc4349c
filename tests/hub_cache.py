"""A stand-in for the Hugging Face hub: its cache on this machine, laid out by hand, offline."""

import os
from collections.abc import Iterable
from pathlib import Path

_COMMIT = "0" * 40


def write_hub_cache(folder: Path, hub_id: str, files: Iterable[Path]) -> dict[str, str]:
    """Puts files into the cache below `folder` as if they came from the hub.

    Returns:
      The environment in which a process finds them there, and asks no network.
    """
    repository = folder / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    for file in files:
        os.symlink(Path(file).resolve(), snapshot / file.name)  # as the cache itself does
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT)
    return {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}


def use_hub_cache(monkeypatch, folder: Path) -> None:
    """The same for this process, in which huggingface_hub may be imported already."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", True)
