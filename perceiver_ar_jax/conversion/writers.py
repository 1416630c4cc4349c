"""Writes a model as its source reads it: perceiver-io by `from_pretrained`."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion.perceiver_io import PERCEIVER_IO
from perceiver_ar_jax.conversion.rules import Rules
from perceiver_ar_jax.conversion.safetensors_files import write_safetensors


def write_reference(
    folder: str | Path,
    params: Mapping[str, Any],
    config: PerceiverARConfig,
    *,
    rules: Rules = PERCEIVER_IO,
    overwrite: bool = False,
) -> None:
    """Writes config.json and model.safetensors of a source; the folder appears when complete.

    The tensors keep the dtype of the parameters.

    Raises:
      ValueError: the folder has something in it and `overwrite` is false, or the parameters
        are not those of the config.
    """
    specs = rules.torch_specs(params, config)
    with new_folder(folder, overwrite=overwrite) as partial:
        write_safetensors(
            partial / "model.safetensors",
            {rules.written_prefix + name: spec for name, spec in specs.items()},
            ((rules.written_prefix + n, x) for n, x in rules.iterate_torch(params, config)),
        )
        (partial / "config.json").write_text(json.dumps(rules.write_config(config), indent=2))


@contextlib.contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that gets its name only when the block ends without an error.

    Raises:
      ValueError: something is there already and `overwrite` is false.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; overwrite replaces it")
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    replaced = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
