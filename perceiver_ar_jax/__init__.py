"""Perceiver AR, the long-context causal language model, in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from perceiver_ar_jax._version import __version__

if TYPE_CHECKING:
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

# Imported on first use: JAX takes a second, which `--help` does not need.
_HOMES = {
    "PerceiverAR": "model",
    "PerceiverARConfig": "config",
    "Pretrained": "pretrained",
    "generate": "generation",
    "load_pretrained": "pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
