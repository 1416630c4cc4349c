"""Which keys a query may see, as boolean arrays: True is visible."""

import jax
import jax.numpy as jnp


def causal(
    num_queries: int,
    num_keys: int,
    pad_mask_BK: jax.Array | None = None,
    segment_ids_BK: jax.Array | None = None,
) -> jax.Array:
    """Right-aligned causal mask that also hides padded keys and those of other segments.

    Query i of L sees key j of K where j <= K - L + i, so the last query sees all keys; its segment
    is that of key K - L + i. Returns (B, L, K), or (1, L, K) without pad mask and segments.
    """
    last_visible_L1 = jnp.arange(num_queries)[:, None] + (num_keys - num_queries)
    mask_BLK = (jnp.arange(num_keys) <= last_visible_L1)[None]
    if pad_mask_BK is not None:
        mask_BLK &= ~pad_mask_BK[:, None, :]
    if segment_ids_BK is not None:
        segment_ids_BL = segment_ids_BK[:, num_keys - num_queries :]
        mask_BLK &= segment_ids_BL[:, :, None] == segment_ids_BK[:, None, :]
    return mask_BLK
