"""Attention of new tokens to a cache: no softmax statistics, no gradients."""

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention.visibility import MASK_VALUE

SUBLANES = 8  # rows of a TPU's registers


def attend(q_BNH: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    """Output (B, N, H).

    Args:
      q_BNH: the query of each row, scaled and rotated; (N, H) where the batch is 1, and likewise
        for the others: XLA on CPU copies a cache in which a dimension is 1.
      k_BNHK: rotated keys, in the cache's layout.
      v_BNHK: values.
      mask_BK: True where a key is visible.
    """
    return jax.lax.platform_dependent(
        q_BNH, k_BNHK, v_BNHK, mask_BK, tpu=_attend_on_tpu, default=_attend
    )


def _attend(q_BNH, k_BNHK, v_BNHK, mask_BK):
    weights = attention_weights(q_BNH, k_BNHK, mask_BK).astype(q_BNH.dtype)
    return jnp.einsum("...NK,...NHK->...NH", weights, v_BNHK)


def _attend_on_tpu(q_BNH, k_BNHK, v_BNHK, mask_BK):
    # The compiler leaves one query to the vector units, which are slower than the memory: by its
    # cycles a token of the 455M model after 65,536 others takes 8.0 ms, and in eight rows 1.8.
    q_BTNH = jnp.repeat(jnp.expand_dims(q_BNH, -3), SUBLANES, axis=-3)
    mask_BTK = jnp.expand_dims(mask_BK, -2)
    out_BTNH = attend_several(jax.lax.optimization_barrier(q_BTNH), k_BNHK, v_BNHK, mask_BTK)
    return jax.lax.optimization_barrier(out_BTNH)[..., 0, :, :]


def attention_weights(q_BNH: jax.Array, k_BNHK: jax.Array, mask_BK: jax.Array) -> jax.Array:
    """The weights of `attend`, (B, N, K) float32; each sums to 1 over K."""
    scores = jnp.einsum("...NH,...NHK->...NK", q_BNH, k_BNHK, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(jnp.expand_dims(mask_BK, -2), scores, MASK_VALUE))


def attend_several(
    q_BTNH: jax.Array, k_BNHK: jax.Array, v_BNHK: jax.Array, mask_BTK: jax.Array
) -> jax.Array:
    """Output (B, T, N, H) of several queries per row, each with a mask of its own."""
    scores = jnp.einsum("...TNH,...NHK->...NTK", q_BTNH, k_BNHK, preferred_element_type=jnp.float32)
    mask = jnp.expand_dims(mask_BTK, -3)
    weights = jax.nn.softmax(jnp.where(mask, scores, MASK_VALUE)).astype(q_BTNH.dtype)
    return jnp.einsum("...NTK,...NHK->...TNH", weights, v_BNHK)
