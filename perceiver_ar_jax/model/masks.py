"""Which keys a query may see, as boolean arrays: True is visible."""

import jax
import jax.numpy as jnp


def causal(num_queries: int, num_keys: int, pad_mask_BK: jax.Array | None = None) -> jax.Array:
    """Right-aligned causal mask that also hides padded keys.

    Query i of L sees key j of K where j <= K - L + i, so the last query sees all keys.
    Returns (B, L, K), or (1, L, K) without a pad mask.
    """
    last_visible_L1 = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    mask_1LK = (jnp.arange(num_keys) <= last_visible_L1)[None]
    return mask_1LK if pad_mask_BK is None else mask_1LK & ~pad_mask_BK[:, None, :]
