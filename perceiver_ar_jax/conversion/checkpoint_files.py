"""Finds the files of a checkpoint and reads them, in whichever of its forms it comes.

Nothing here knows what the tensors mean: that is for the rules of a source.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_ar_jax.conversion.safetensors_files import read_safetensors
from perceiver_ar_jax.conversion.stored_tensor import StoredTensor
from perceiver_ar_jax.conversion.torch_files import OLD_MAGIC, ZIP_MAGIC, read_torch_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
Tensors = dict[str, StoredTensor | np.ndarray]


@dataclasses.dataclass(frozen=True)
class CheckpointFiles:
    """What the files of a checkpoint hold, under the names that they use."""

    path: Path
    config_path: Path  # the config.json, or the Lightning file
    config: Mapping[str, Any]  # its content, or the Lightning file's hyper_parameters
    tensors: Tensors
    tokenizer_files: tuple[Path, ...]


def read_files(source: str | Path) -> CheckpointFiles:
    """Finds and reads the files of a checkpoint; tensors are read when they are used.

    Args:
      source: a Hugging Face directory (safetensors or .bin, whole or in shards), a Lightning
        .ckpt, a .safetensors or .bin file with its config.json next to it, or the id of a model on
        the Hugging Face hub.

    Raises:
      ValueError: no checkpoint there, or one that is damaged or refused.
    """
    path = Path(source)
    if not path.exists():
        path = _download(str(source))
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    if path.is_dir():
        config, tensors = _read_config(config_path), _read_directory(path)
    else:
        content = _read_weights(path)
        settings = content.get("hyper_parameters") if isinstance(content, dict) else None
        if isinstance(settings, dict):
            config_path, config, content = path, settings, content.get("state_dict")
        elif config_path.is_file():
            config = _read_config(config_path)
        else:
            raise ValueError(
                f"{path} has no hyper_parameters (Lightning), and there is no {config_path}"
            )
        tensors = _state_dict(content, path)
    return CheckpointFiles(path, config_path, config, tensors, _tokenizer_files(folder))


def check_size(tensors: Mapping[str, StoredTensor | np.ndarray]) -> None:
    """Raises ValueError where a small file would fill the memory.

    Tensors may share storage (tied or expanded weights), so they can need more bytes than there
    are in the files; but then at most half of the machine's memory.
    """
    stored = [tensor for tensor in tensors.values() if isinstance(tensor, StoredTensor)]
    needed = sum(tensor.nbytes for tensor in stored)
    available = sum(path.stat().st_size for path in {tensor.path for tensor in stored})
    if needed > max(available, _memory_bytes() // 2):
        raise ValueError(
            f"its tensors share storage: {needed} bytes from {available} bytes of files, more than "
            f"half of this machine's memory"
        )


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_directory(folder: Path) -> Tensors:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _state_dict(_read_weights(folder / name), folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
    raise ValueError(
        f"{folder} has no weights; looked for {', '.join(WEIGHTS)} and an .index.json of either"
    )


def _read_shards(folder: Path, index: Path) -> Tensors:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    tensors: Tensors = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index} names {name!r}, which is not in its folder")
        shard = _state_dict(_read_weights(folder / name), folder / name)
        if shard.keys() & tensors:
            raise ValueError(f"{index}: {min(shard.keys() & tensors)} is in two of its files")
        tensors |= shard
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ValueError(f"{index} names {missing[0]}, which is not in {places[missing[0]]}")
    return tensors


def _read_weights(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(len(OLD_MAGIC))
    if start.startswith(ZIP_MAGIC) or start == OLD_MAGIC:
        return read_torch_file(path)
    if start[8:9] == b"{":
        return read_safetensors(path)
    raise ValueError(
        f"{path} is neither a safetensors nor a PyTorch file: {path.stat().st_size} bytes, "
        f"the first are {start!r}"
    )


def _state_dict(content: Any, path: Path) -> Tensors:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no state dict")
    kinds = StoredTensor | np.ndarray
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, kinds)}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; a Hugging Face directory has config.json and one of "
            f"{', '.join(WEIGHTS)}"
        )
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, with the path, if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def _download(source: str) -> Path:
    """The folder of huggingface_hub's cache with a model's files, fetched if need be."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(
            f"nothing at {source}; looked for a Hugging Face directory, a .safetensors, .bin or "
            ".ckpt file, and it is not a hub id (owner/name)"
        )
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"nothing at {source}; if it is a hub id, install the [hub] extra: "
            "pip install 'perceiver-ar-jax[hub]'"
        ) from None
    small = ["config.json", *TOKENIZER_FILES]
    try:
        for weights in WEIGHTS:
            stem, suffix = weights.split(".")
            patterns = [*small, f"{stem}*.{suffix}", f"{weights}.index.json"]
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
            if any(folder.glob(f"{stem}*.{suffix}")):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"nothing at {source}, nor on the Hugging Face hub: {reason}") from None
    return folder
