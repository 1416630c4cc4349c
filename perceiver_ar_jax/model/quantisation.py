"""int8 with a scale for each vector."""

import jax
import jax.numpy as jnp


def quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors of int8, (..., D), and what 1 stands for in each, (..., 1) float32."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny * 127) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale
