"""What a conversion did, for the record: sizes, numbers per tensor, checks and times."""

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import ml_dtypes
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion.perceiver_io import PERCEIVER_IO
from perceiver_ar_jax.conversion.rules import Rules
from perceiver_ar_jax.conversion.stored_tensor import checksum
from perceiver_ar_jax.model.positions import inverse_frequencies

PACKAGES = ("perceiver-ar-jax", "jax", "flax", "numpy", "torch", "perceiver-io")


def describe_model(
    tensors: Mapping[str, Any], config: PerceiverARConfig, rules: Rules = PERCEIVER_IO
) -> dict[str, Any]:
    """Sizes, and per tensor of the source its shape, dtype, largest magnitude and CRC-32."""
    described = {name: _describe_tensor(np.asarray(tensor)) for name, tensor in tensors.items()}
    parameters = [name for name in tensors if name != rules.frequencies]
    return {
        "parameters": sum(math.prod(tensors[name].shape) for name in parameters),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "config": config.to_dict(),
        "inverse_frequencies": describe_frequencies(config),
        "tensors": described,
    }


def describe_frequencies(config: PerceiverARConfig) -> dict[str, float]:
    """How far the stored rotary frequencies are from the formula, and from it in bfloat16.

    The public 455M checkpoint was trained with a buffer in bfloat16 that was saved as float32;
    recomputed frequencies would give other logits.
    """
    stored = inverse_frequencies(config)
    formula = inverse_frequencies(config.replace(rotary_inv_freq=None))
    rounded = formula.astype(ml_dtypes.bfloat16).astype(np.float32)
    from_formula = _max_abs(stored - formula)
    return {
        "max_abs_stored_minus_formula": from_formula,
        "max_abs_stored_minus_bf16_formula": _max_abs(stored - rounded),
        "radians_from_formula_at_last_position": from_formula * (config.max_seq_len - 1),
    }


def versions() -> dict[str, str]:
    """Python and the packages that took part, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _describe_tensor(array: np.ndarray) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "max_abs": _max_abs(array),
        "crc32": f"{checksum(array):08x}",
    }


def _max_abs(array: np.ndarray) -> float:
    return float(max(array.max(), -array.min())) if array.size else 0.0
