"""Perceiver AR, the long-context causal language model, in JAX and Flax."""

from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.generation import generate
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.pretrained import Pretrained, load_pretrained

__all__ = [
    "PerceiverAR",
    "PerceiverARConfig",
    "Pretrained",
    "__version__",
    "generate",
    "load_pretrained",
]
