"""Small models of ours, every parameter off its default, and a jit that compiles them fast."""

import functools

import jax
import numpy as np
from quick_compilation import QUICK_OPTIONS

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.model import init_params

# Also where the rest of a test is compiled as users do.
quick_jit = functools.partial(jax.jit, compiler_options=QUICK_OPTIONS)


def small_config(**changes) -> PerceiverARConfig:
    """Two layers, one of them rotary, over at most 6 latents and a prefix of 8; no dropout."""
    fields = {
        "vocab_size": 48,
        "max_seq_len": 14,
        "max_latents": 6,
        "num_channels": 16,
        "num_heads": 2,
        "num_self_attention_layers": 2,
        "self_attention_widening_factor": 2,
        "cross_attention_widening_factor": 2,
        "cross_attention_dropout": 0.0,
        "output_norm": True,
    }
    return PerceiverARConfig(**fields | changes)


def random_params(config: PerceiverARConfig, seed: int = 0) -> dict:
    """Parameters drawn around 1 (scales of norms) or 0 (all others)."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = 0.3 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")
        return x.astype(leaf.dtype)

    shapes = jax.eval_shape(lambda: init_params(PerceiverAR(config), jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_tokens(config: PerceiverARConfig, length: int, batch: int = 2, seed: int = 0):
    """Token ids, (B, S)."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def left_pads(pads_B, length: int) -> np.ndarray:
    """The pad mask of rows with so many pads each, (B, S)."""
    return np.arange(length) < np.asarray(pads_B)[:, None]
