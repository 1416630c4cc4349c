"""The presets of configs/: in a clone beside the package, in a wheel inside it."""

import runpy
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent


def preset(name: str, *argument: str) -> Any:
    """The `ConfigDict` of configs/NAME.py, for another config file or a program to change.

    Raises:
      ValueError: there is no such preset.
    """
    return read_config(find_config(name), *argument)


def presets() -> list[str]:
    """The names of all presets."""
    return sorted(file.stem for file in folder().glob("[!_]*.py"))


def folder() -> Path:
    """Where the presets are."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find_config(given: str) -> Path:
    """The file of a preset's name, or of a path: as given, or as it is in a clone.

    Raises:
      ValueError: a name is none of the presets.
      FileNotFoundError: there is no such file.
    """
    name = Path(given).name == given and not given.endswith(".py")
    candidates = [Path(given), folder().parent / given]
    if name:
        candidates.append(folder() / f"{given}.py")
    found = next((file for file in candidates if file.is_file()), None)
    if found is not None:
        return found
    if name:
        raise ValueError(f"there is no preset {given!r}; there are {', '.join(presets())}")
    raise FileNotFoundError("there is no such file")


def read_config(file: Path, *argument: str) -> Any:
    """What the file's get_config() returns.

    Raises:
      ValueError: it does not define get_config(). Whatever else the file raises passes.
    """
    found = runpy.run_path(str(file)).get("get_config")
    if found is None:
        raise ValueError("it does not define get_config()")
    return found(*argument)
