"""Proof that a conversion is right: the source's own logits, and a round trip of every bit."""

import concurrent.futures
import multiprocessing
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion.rules import Rules
from perceiver_ar_jax.conversion.stored_tensor import checksum
from perceiver_ar_jax.model import PerceiverAR

# Of the largest logit. The same weights in another order of summation differ by 1e-6 to 1e-5 of
# it; a wrong transform by a tenth and more.
TOLERANCE = 1e-3


class VerificationError(Exception):
    """The converted model is not the one it was made from."""

    exit_code = 1


class Inputs(NamedTuple):
    """Random left-padded rows; the padding stays in the prefix, where the reference masks it."""

    tokens_BS: np.ndarray
    prefix_len: int
    pad_mask_BS: np.ndarray


class Comparison(NamedTuple):
    """Logits of the two models on the same input."""

    max_abs_difference: float
    max_abs_logit: float
    max_kl: float  # KL(reference ‖ ours) of the worst position, in nats
    mean_kl: float

    @property
    def passed(self) -> bool:
        """Whether the difference is one of rounding; false for NaN."""
        return self.max_abs_difference <= TOLERANCE * max(1.0, self.max_abs_logit)


def random_inputs(config: PerceiverARConfig, rows: int, seed: int = 0) -> Inputs:
    """Rows of random tokens, the first of them unpadded."""
    rng = np.random.default_rng(seed)
    prefix_len = min(config.max_prefix_len, 2048)
    length = prefix_len + min(config.max_latents, 32)
    pads = rng.integers(0, prefix_len + 1, rows)
    pads[:1] = 0
    tokens_BS = rng.integers(0, config.vocab_size, (rows, length))
    return Inputs(tokens_BS, prefix_len, np.arange(length) < pads[:, None])


def reference_logits(
    rules: Rules, tensors: Mapping[str, Any], config: PerceiverARConfig, inputs: Inputs
) -> np.ndarray:
    """The source's logits, (B, L, V) float32, with weights rounded to `config.param_dtype`.

    Runs in a process of its own: torch then neither stays in this one nor adds to its memory.

    Raises:
      ImportError: a library of the source is missing.
    """
    context = multiprocessing.get_context("spawn")
    quiet = signal.signal, (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches both processes
    with concurrent.futures.ProcessPoolExecutor(1, context, *quiet) as pool:
        return pool.submit(rules.logits, tensors, config, *inputs).result()


def our_logits(params: Mapping[str, Any], config: PerceiverARConfig, inputs: Inputs) -> np.ndarray:
    """Our model's logits, (B, L, V), computed in float32 as the reference does."""
    model = PerceiverAR(config.replace(dtype="float32"))
    apply = jax.jit(model.apply, static_argnames="prefix_len")
    tokens_BS, prefix_len, pad_mask_BS = inputs
    return np.asarray(
        apply({"params": params}, tokens_BS, prefix_len=prefix_len, pad_mask=pad_mask_BS)
    )


def compare(reference_BLV: np.ndarray, ours_BLV: np.ndarray) -> Comparison:
    """How far apart two arrays of logits are."""
    with np.errstate(invalid="ignore"):  # NaN stays NaN, and does not pass
        kl_BL = _kl_divergence(reference_BLV.astype(np.float64), ours_BLV.astype(np.float64))
    return Comparison(
        max_abs_difference=float(np.abs(reference_BLV - ours_BLV).max()),
        max_abs_logit=float(np.abs(reference_BLV).max()),
        max_kl=float(kl_BL.max()),
        mean_kl=float(kl_BL.mean()),
    )


def differing_tensors(
    rules: Rules, tensors: Mapping[str, Any], params: Mapping[str, Any], config: PerceiverARConfig
) -> list[str]:
    """The source's names of the tensors that our parameters do not give back, by checksum.

    A tensor of another dtype than the parameters is rounded to theirs first.
    """
    return [
        name
        for name, array in rules.iterate_torch(params, config)
        if checksum(np.asarray(tensors[name], array.dtype)) != checksum(array)
    ]


def checked_round_trip(
    rules: Rules, tensors: Mapping[str, Any], params: Mapping[str, Any], config: PerceiverARConfig
) -> str:
    """Says that every tensor comes back; VerificationError if one does not."""
    differing = differing_tensors(rules, tensors, params, config)
    if differing:
        raise VerificationError(f"tensors differ after a round trip: {', '.join(differing[:8])}")
    return f"{len(tensors)} tensors come back bit for bit"


def checked_logits(rules: Rules, reference_BLV: np.ndarray, ours_BLV: np.ndarray) -> dict[str, Any]:
    """How far apart the logits are; VerificationError if that is more than rounding."""
    comparison = compare(reference_BLV, ours_BLV)
    if not comparison.passed:
        raise VerificationError(f"logits differ from those of {rules.name}: {comparison._asdict()}")
    return comparison._asdict()


def _kl_divergence(p_BLV: np.ndarray, q_BLV: np.ndarray) -> np.ndarray:
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p_BLV, q_BLV))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
