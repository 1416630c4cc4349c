"""Verified conversion between a checkpoint of ours and one of another library, as library calls.

The output folder appears only when it is complete and has passed its checks. It holds a
certificate, `conversion.json`, with sizes, checksums, checks, times and versions.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion import (
    ReferenceCheckpoint,
    read_reference,
    to_torch,
    write_reference,
)
from perceiver_ar_jax.conversion.certificate import describe_model, versions
from perceiver_ar_jax.conversion.verification import (
    Inputs,
    checked_logits,
    checked_round_trip,
    our_logits,
    random_inputs,
    reference_logits,
)
from perceiver_ar_jax.conversion.writers import new_folder
from perceiver_ar_jax.pretrained import (
    CHECKPOINTS_FOLDER,
    Pretrained,
    load_pretrained,
    save_pretrained,
)
from perceiver_ar_jax.tokenizers import load_tokenizer

CERTIFICATE = "conversion.json"


def convert_from_torch(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    verify_rows: int | None = 2,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts a checkpoint of perceiver-io to a folder that `load_pretrained` reads.

    Args:
      source: a path or hub id, as `read_reference` takes it.
      output: the folder that is made.
      dtype: "float32" or "bfloat16", of the weights; None keeps the stored one.
      tokenizer: as `load_tokenizer` takes it; None takes the one next to the weights.
      verify_rows: random rows whose logits are compared with those of the source's own model,
        where that is installed; None makes no checks.
      overwrite: replaces what is in `output`.

    Returns:
      The certificate.

    Raises:
      ValueError: the source is unusable, or `output` is not empty.
      VerificationError: the result is not the source's model; nothing was written.
    """
    seconds: dict[str, float] = {}
    reference, config = _read_source(source, dtype)
    rules, tensors = reference.rules, reference.tensors
    chosen_tokenizer = _tokenizer_of(reference, tokenizer)
    checks: dict[str, Any] = {}
    with new_folder(output, overwrite=overwrite) as folder:
        expected = None
        if verify_rows:  # the source's model first, while no parameters are in memory here
            inputs = random_inputs(config, verify_rows)
            with _timed(seconds, "reference"):
                expected = _logits_if_installed(reference, config, inputs, checks)
        with _timed(seconds, "convert"):
            params = rules.to_flax(tensors, config)
        with _timed(seconds, "write"):
            save_pretrained(folder, config, params, tokenizer=chosen_tokenizer)
        del params
        if verify_rows:
            with _timed(seconds, "verify"):
                written = load_pretrained(folder)
                checks["round_trip"] = checked_round_trip(
                    rules, tensors, written.params, written.config
                )
                if expected is not None:
                    ours = our_logits(written.params, written.config, inputs)
                    checks["logits"] = checked_logits(rules, expected, ours)
        model = describe_model(tensors, config, rules)
        return _certified(folder, source, "from torch", model, checks, seconds)


def convert_to_torch(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    verify_rows: int | None = 2,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts a checkpoint of ours to a folder that perceiver-io's `from_pretrained` reads.

    `source` is a workdir or a converted folder; the rest is as in `convert_from_torch`.

    Raises:
      ValueError: the source is not a checkpoint of ours, or `output` is not empty.
      CheckpointError: the source has no intact step.
      VerificationError: the result is not the source's model; nothing was written.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        ours = _load_ours(source, dtype)
    config = ours.config
    chosen_tokenizer = ours.tokenizer
    if tokenizer is not None:
        chosen_tokenizer = load_tokenizer(tokenizer, vocab_size=config.vocab_size)
    checks: dict[str, Any] = {}
    with new_folder(output, overwrite=overwrite) as folder:
        with _timed(seconds, "write"):
            write_reference(folder, ours.params, config)
            if chosen_tokenizer is not None:
                chosen_tokenizer.save(folder)
        reference = read_reference(folder)
        rules, tensors = reference.rules, reference.tensors
        if verify_rows:
            inputs = random_inputs(config, verify_rows)
            with _timed(seconds, "verify"):
                checks["round_trip"] = checked_round_trip(rules, tensors, ours.params, config)
                our_logits_BLV = our_logits(ours.params, config, inputs)
            del ours  # the source's model last, when our parameters are no longer in memory
            with _timed(seconds, "reference"):
                expected = _logits_if_installed(reference, config, inputs, checks)
            if expected is not None:
                checks["logits"] = checked_logits(rules, expected, our_logits_BLV)
        model = describe_model(tensors, config, rules)
        return _certified(folder, source, "to torch", model, checks, seconds)


def describe_torch(
    source: str | Path, *, dtype: str | None = None, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """What `convert_from_torch` would convert, as in its certificate's `model`; writes nothing."""
    reference, config = _read_source(source, dtype)
    _tokenizer_of(reference, tokenizer)
    return describe_model(reference.tensors, config, reference.rules)


def describe_ours(
    source: str | Path, *, dtype: str | None = None, tokenizer: str | Path | None = None
) -> dict[str, Any]:
    """What `convert_to_torch` would convert, as in its certificate's `model`; writes nothing."""
    ours = _load_ours(source, dtype)
    if tokenizer is not None:
        load_tokenizer(tokenizer, vocab_size=ours.config.vocab_size)
    return describe_model(to_torch(ours.params, ours.config), ours.config)


def _read_source(
    source: str | Path, dtype: str | None
) -> tuple[ReferenceCheckpoint, PerceiverARConfig]:
    reference = read_reference(source)
    return reference, reference.config.replace(param_dtype=dtype or reference.config.param_dtype)


def _load_ours(source: str | Path, dtype: str | None) -> Pretrained:
    if not Path(source, CHECKPOINTS_FOLDER).is_dir():
        raise ValueError(
            f"{source} is not a checkpoint of ours: there is no {CHECKPOINTS_FOLDER}/ in it"
        )
    ours = load_pretrained(source)
    config = ours.config.replace(param_dtype=dtype or ours.config.param_dtype)
    params = jax.tree.map(lambda x: x.astype(config.param_dtype), ours.params)
    return Pretrained(ours.model, params, config, ours.tokenizer, ours.step)


def _tokenizer_of(reference: ReferenceCheckpoint, named: str | Path | None):
    """The named tokenizer, otherwise the one next to the weights if it is of a kind we read."""
    vocab_size = reference.config.vocab_size
    if named is not None:
        return load_tokenizer(named, vocab_size=vocab_size)
    if not reference.tokenizer_files:
        return None
    try:
        return load_tokenizer(reference.tokenizer_files[0].parent, vocab_size=vocab_size)
    except ValueError as error:
        warnings.warn(f"converting without its tokenizer: {error}", stacklevel=2)
        return None


def _logits_if_installed(
    reference: ReferenceCheckpoint,
    config: PerceiverARConfig,
    inputs: Inputs,
    checks: dict[str, Any],
):
    try:
        return reference_logits(reference.rules, reference.tensors, config, inputs)
    except ImportError as error:
        checks["logits"] = f"not compared: {error}"
        return None


def _certified(folder, source, direction, model, checks, seconds) -> dict[str, Any]:
    """Writes the certificate into the folder; returns it."""
    certificate = {
        "source": str(source),
        "direction": direction,
        "model": model,
        "checks": checks,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "versions": versions(),
    }
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=1))
    return certificate


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
