"""Finds and reads a checkpoint of perceiver-io, in whichever of its forms it comes."""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion import rules
from perceiver_ar_jax.conversion.reference_config import config_from_reference, unknown_fields
from perceiver_ar_jax.conversion.safetensors_files import read_safetensors
from perceiver_ar_jax.conversion.stored_tensor import StoredTensor
from perceiver_ar_jax.conversion.torch_files import OLD_MAGIC, ZIP_MAGIC, read_torch_file

MODEL_TYPE = "perceiver-ar-causal-language-model"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class ReferenceCheckpoint:
    """A checkpoint of perceiver-io: its config as ours, and where its tensors are."""

    source: Path
    config: PerceiverARConfig
    tensors: Mapping[str, StoredTensor | np.ndarray]  # perceiver-io's names, without a prefix
    tokenizer_files: tuple[Path, ...] = ()


def read_reference(source: str | Path) -> ReferenceCheckpoint:
    """Reads the config and finds the tensors of a checkpoint of perceiver-io.

    Args:
      source: a Hugging Face directory (safetensors or .bin, whole or in shards), a Lightning
        .ckpt, a .safetensors or .bin file with its config.json beside it, or the id of a model on
        the Hugging Face hub.

    Returns:
      The checkpoint; `config.rotary_inv_freq` has the stored frequencies, `config.param_dtype`
      is bfloat16 if all parameters are. Tensors are read when they are used.

    Raises:
      ValueError: no checkpoint there, or one that is damaged, refused or of another model.
    """
    path = Path(source)
    if not path.exists():
        path = _download(str(source))
    if path.is_dir():
        fields, tensors = _model_config(path / "config.json"), _read_directory(path)
    else:
        fields, tensors = _read_file(path)
    try:
        return _checked(path, fields, _without_prefix(tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _checked(
    path: Path, fields: Mapping[str, Any], tensors: dict[str, StoredTensor | np.ndarray]
) -> ReferenceCheckpoint:
    config = config_from_reference(fields)
    rules.check_tensors(tensors, config)
    _check_size(tensors)
    frequencies = np.asarray(tensors[rules.FREQUENCIES]).astype(np.float32)
    dtypes = {str(tensor.dtype) for name, tensor in tensors.items() if name != rules.FREQUENCIES}
    return ReferenceCheckpoint(
        source=path,
        config=config.replace(
            rotary_inv_freq=tuple(frequencies.tolist()),
            param_dtype="bfloat16" if dtypes == {"bfloat16"} else "float32",
        ),
        tensors=tensors,
        tokenizer_files=_tokenizer_files(path if path.is_dir() else path.parent),
    )


def _check_size(tensors: Mapping[str, StoredTensor | np.ndarray]) -> None:
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


def _read_directory(folder: Path) -> dict[str, StoredTensor | np.ndarray]:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _state_dict(_read_weights(folder / name), folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
    raise ValueError(
        f"{folder} has no weights; looked for {', '.join(WEIGHTS)} and an .index.json of either"
    )


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor | np.ndarray]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    tensors = {}
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


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, StoredTensor | np.ndarray]]:
    content = _read_weights(path)
    fields = content.get("hyper_parameters") if isinstance(content, dict) else None
    if isinstance(fields, dict):
        return fields, _state_dict(content.get("state_dict"), path)
    config = path.parent / "config.json"
    if not config.is_file():
        raise ValueError(f"{path} has no hyper_parameters (Lightning), and there is no {config}")
    return _model_config(config), _state_dict(content, path)


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


def _state_dict(content: Any, path: Path) -> dict[str, StoredTensor | np.ndarray]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no state dict")
    kinds = StoredTensor | np.ndarray
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, kinds)}


def _without_prefix(
    tensors: Mapping[str, StoredTensor | np.ndarray],
) -> dict[str, StoredTensor | np.ndarray]:
    """Drops what wrappers put before perceiver-io's names: `backend_model.`, `model.` and such."""
    prefixes = [
        name.removesuffix(rules.TOKEN_EMBEDDING)
        for name in tensors
        if name.endswith(rules.TOKEN_EMBEDDING)
    ]
    if len(prefixes) != 1:
        raise ValueError(
            f"no Perceiver AR: {len(prefixes)} of its {len(tensors)} tensors end in "
            f"{rules.TOKEN_EMBEDDING}, the first are {list(tensors)[:3]}"
        )
    result = {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items()}
    if len(result) < len(tensors):
        raise ValueError(f"some tensors are there with and without the prefix {prefixes[0]}")
    return result


def _model_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; a Hugging Face directory has config.json and one of "
            f"{', '.join(WEIGHTS)}"
        )
    content = read_json(path)
    fields = content.get("model_config")
    if "model" in content and fields is None:
        raise ValueError(f"{path.parent} is a checkpoint of ours; --to_torch exports it")
    if content.get("model_type") != MODEL_TYPE or not isinstance(fields, dict):
        raise ValueError(
            f"{path} describes no {MODEL_TYPE} but model_type {content.get('model_type')!r:.80}"
        )
    unknown = unknown_fields(fields)
    if unknown:
        warnings.warn(f"{path} has fields unknown here, ignored: {unknown}", stacklevel=3)
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, with the path, if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def _download(source: str) -> Path:
    """The folder of huggingface_hub's cache with a model's files, fetched if need be."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(
            f"nothing at {source}; looked for a Hugging Face directory, a .safetensors, .bin or "
            ".ckpt file, and it is no hub id (owner/name)"
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
