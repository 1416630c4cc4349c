"""Finds a dataset under the name that TFDS gives it, in the folder where TFDS prepares it."""

import os
import re

from etils import epath

DATA_DIR_VARIABLE, DEFAULT_DATA_DIR = "TFDS_DATA_DIR", "~/tensorflow_datasets"
INFO_FILE = "dataset_info.json"
_NAME = re.compile(r"([a-z_][a-z0-9_]*)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def is_dataset_name(source: str) -> bool:
    """Whether TFDS users could mean a dataset: `c4`, `c4/en`, `c4/en:3.0.1`."""
    return _NAME.fullmatch(source) is not None


def find_prepared(name: str) -> epath.Path:
    """The directory of `name[/config][:version]`; without a version the newest one.

    Raises:
      ValueError: it is not there, or several configs could be meant; one line that says where it
        was looked for and which command prepares it.
    """
    dataset, config, version = _NAME.fullmatch(name).groups()
    variable = os.environ.get(DATA_DIR_VARIABLE)
    data_dir = epath.Path(variable or DEFAULT_DATA_DIR).expanduser()
    parts = [part for part in (dataset, config, version) if part]
    exact = data_dir.joinpath(*parts)
    if version and (exact / INFO_FILE).exists():
        return exact
    prepared = _prepared_versions(data_dir / dataset)
    chosen = [
        path
        for path in prepared
        if config in (None, path.parent.name) and version in (None, path.name)
    ]
    if len({path.parent for path in chosen}) > 1:
        raise ValueError(
            f"{name} may mean {' or '.join(_name_of(path, data_dir) for path in chosen)}: name one"
        )
    if chosen:
        return max(chosen, key=lambda path: [int(number) for number in path.name.split(".")])
    others = ", ".join(_name_of(path, data_dir) for path in prepared[:3])
    where = f"${DATA_DIR_VARIABLE}" if variable else f"${DATA_DIR_VARIABLE} is not set"
    raise ValueError(
        f"no data at {name}: it is neither a file nor a folder, and {exact} is not there either "
        f"({where}{f'; {data_dir} has {others}' if others else ''}). Prepare it with: tfds build "
        f"{name} --data_dir={data_dir} --file_format=array_record"
    )


def _prepared_versions(folder: epath.Path) -> list[epath.Path]:
    """Prepared directories of a dataset, with a config's name above them or without."""
    if not folder.is_dir():
        return []
    infos = (info for depth in ("*", "*/*") for info in folder.glob(f"{depth}/{INFO_FILE}"))
    return sorted(info.parent for info in infos if _VERSION.fullmatch(info.parent.name))


def _name_of(path: epath.Path, data_dir: epath.Path) -> str:
    return f"{path.parent.relative_to(data_dir)}:{path.name}"
