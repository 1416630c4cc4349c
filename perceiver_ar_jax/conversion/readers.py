"""Reads a checkpoint of a source that we have rules for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion.checkpoint_files import (
    CheckpointFiles,
    Tensors,
    check_size,
    read_files,
)
from perceiver_ar_jax.conversion.perceiver_io import PERCEIVER_IO
from perceiver_ar_jax.conversion.rules import Rules
from perceiver_ar_jax.conversion.stored_tensor import StoredTensor

SOURCES = (PERCEIVER_IO,)


@dataclasses.dataclass(frozen=True)
class ReferenceCheckpoint:
    """A checkpoint of a source: its config as ours, its rules, and where its tensors are."""

    source: Path
    config: PerceiverARConfig
    tensors: Mapping[str, StoredTensor | np.ndarray]  # the source's names, without a prefix
    tokenizer_files: tuple[Path, ...] = ()
    rules: Rules = PERCEIVER_IO


def read_reference(source: str | Path) -> ReferenceCheckpoint:
    """Reads the config and finds the tensors of a checkpoint.

    Args:
      source: a path or hub id, as `checkpoint_files.read_files` takes it.

    Returns:
      The checkpoint; `config.rotary_inv_freq` has the stored frequencies, `config.param_dtype`
      is bfloat16 if all parameters are. Tensors are read when they are used.

    Raises:
      ValueError: no checkpoint there, or one that is damaged, refused or of another model.
    """
    files = read_files(source)
    rules = _rules_of(files)
    try:
        tensors = _without_prefix(files.tensors, rules.anchor)
        config = rules.read_config(files.config, files.config_path)
        rules.check_tensors(tensors, config)
        check_size(tensors)
        frequencies = np.asarray(tensors[rules.frequencies]).astype(np.float32)
    except ValueError as error:
        raise ValueError(f"{files.path}: {error}") from None
    dtypes = {str(tensor.dtype) for name, tensor in tensors.items() if name != rules.frequencies}
    return ReferenceCheckpoint(
        source=files.path,
        config=config.replace(
            rotary_inv_freq=tuple(frequencies.tolist()),
            param_dtype="bfloat16" if dtypes == {"bfloat16"} else "float32",
        ),
        tensors=tensors,
        tokenizer_files=files.tokenizer_files,
        rules=rules,
    )


def _rules_of(files: CheckpointFiles) -> Rules:
    """By the model_type of config.json; a Lightning file is known by its tensors."""
    if files.config_path == files.path:
        found = (r for r in SOURCES if any(name.endswith(r.anchor) for name in files.tensors))
        return next(found, SOURCES[0])
    if "model" in files.config and "model_config" not in files.config:
        raise ValueError(
            f"{files.config_path.parent} is a checkpoint of ours; --to_torch exports it"
        )
    model_type = files.config.get("model_type")
    for rules in SOURCES:
        if rules.model_type == model_type:
            return rules
    known = " or ".join(rules.model_type for rules in SOURCES)
    raise ValueError(f"{files.config_path} has model_type {model_type!r:.80}, not {known}")


def _without_prefix(tensors: Tensors, anchor: str) -> Tensors:
    """Drops what wrappers put before the source's names: `backend_model.`, `model.` and such."""
    prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
    if len(prefixes) != 1:
        raise ValueError(
            f"not a Perceiver AR: {len(prefixes)} of its {len(tensors)} tensors end in {anchor}, "
            f"the first are {list(tensors)[:3]}"
        )
    result = {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items()}
    if len(result) < len(tensors):
        raise ValueError(f"some tensors are there with and without the prefix {prefixes[0]}")
    return result
