"""Attention of new tokens to a cache: no softmax statistics, no gradients.

Scales of int8 keys multiply scores, and those of values multiply weights, so that integers are only
cast.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention.visibility import MASK_VALUE

if TYPE_CHECKING:
    from perceiver_ar_jax.model.cache import LayerCache

SUBLANES = 8  # rows of a TPU's registers
CHUNK = 2048  # slots of a head that a CPU casts at a time, so that they stay in its own cache


def attend(q_BNH: jax.Array, cache: "LayerCache", mask_BK: jax.Array) -> jax.Array:
    """Output (B, N, H).

    Args:
      q_BNH: the query of each row, scaled and rotated; (N, H) where the batch is 1, and likewise
        for the others: XLA on CPU copies a cache in which a dimension is 1.
      cache: rotated keys, and values.
      mask_BK: True where a key is visible.
    """
    several = {"tpu": SUBLANES}
    if cache.k_scale is not None:
        several["cpu"] = 1
    return jax.lax.platform_dependent(
        q_BNH,
        cache,
        mask_BK,
        **{name: functools.partial(_attend_as_several, rows=n) for name, n in several.items()},
        default=_attend,
    )


def _attend(q_BNH, cache, mask_BK):
    weights = _scaled(attention_weights(q_BNH, cache, mask_BK), cache.v_scale)
    v_BNHK = cache.v.astype(q_BNH.dtype)
    return jnp.einsum("...NK,...NHK->...NH", weights.astype(q_BNH.dtype), v_BNHK)


def _attend_as_several(q_BNH, cache, mask_BK, rows):
    # The TPU compiler leaves one query to the vector units, which are slower than the memory: by
    # its cycles a token of the 455M model after 65,536 others takes 8.0 ms, and in eight rows 1.8.
    q_BTNH = jnp.repeat(jnp.expand_dims(q_BNH, -3), rows, axis=-3)
    mask_BTK = jnp.expand_dims(mask_BK, -2)
    out_BTNH = attend_several(jax.lax.optimization_barrier(q_BTNH), cache, mask_BTK)
    return jax.lax.optimization_barrier(out_BTNH)[..., 0, :, :]


def attention_weights(q_BNH: jax.Array, cache: "LayerCache", mask_BK: jax.Array) -> jax.Array:
    """The weights of `attend`, (B, N, K) float32; each sums to 1 over K."""
    k_BNHK = cache.k.astype(q_BNH.dtype)
    scores = jnp.einsum("...NH,...NHK->...NK", q_BNH, k_BNHK, preferred_element_type=jnp.float32)
    scores = _scaled(scores, cache.k_scale)
    return jax.nn.softmax(jnp.where(jnp.expand_dims(mask_BK, -2), scores, MASK_VALUE))


def attend_several(q_BTNH: jax.Array, cache: "LayerCache", mask_BTK: jax.Array) -> jax.Array:
    """Output (B, T, N, H) of several queries per row, each with a mask of its own."""
    if cache.k_scale is None:
        return _attend_several(q_BTNH, cache, mask_BTK)
    return jax.lax.platform_dependent(
        q_BTNH, cache, mask_BTK, cpu=_attend_by_chunks, default=_attend_several
    )


def _attend_several(q_BTNH, cache, mask_BTK):
    k_BNHK, v_BNHK = cache.k.astype(q_BTNH.dtype), cache.v.astype(q_BTNH.dtype)
    scores = jnp.einsum("...TNH,...NHK->...NTK", q_BTNH, k_BNHK, preferred_element_type=jnp.float32)
    scores = _scaled(scores, cache.k_scale)
    weights = jax.nn.softmax(jnp.where(jnp.expand_dims(mask_BTK, -3), scores, MASK_VALUE))
    weights = _scaled(weights, cache.v_scale).astype(q_BTNH.dtype)
    return jnp.einsum("...NTK,...NHK->...TNH", weights, v_BNHK)


def _scaled(x, scale_BNK):
    """Scores or weights, (B, N, K) or (B, N, T, K), times the scale of each slot, if it has one."""
    if scale_BNK is None:
        return x
    return x * (scale_BNK if x.ndim == scale_BNK.ndim else jnp.expand_dims(scale_BNK, -2))


def _attend_by_chunks(q_BTNH, cache, mask_BTK):
    # XLA on CPU multiplies no integers by floats: it casts the whole of an operand beforehand.
    *batch, num_tokens, num_heads, width = q_BTNH.shape
    capacity, chunk = cache.capacity, min(CHUNK, cache.capacity)
    q_XTH = jnp.swapaxes(q_BTNH, -3, -2).reshape(-1, num_tokens, width).astype(jnp.float32)
    kv = [x.reshape(-1, width, capacity) for x in (cache.k, cache.v)]
    scales = [x.reshape(-1, capacity) for x in (cache.k_scale, cache.v_scale)]
    mask_BTK = mask_BTK.reshape(-1, *mask_BTK.shape[-2:])

    def attend_head(head):
        """The output of a head, (T, H); heads are counted over the batch."""

        def fold(index, running):
            largest_T1, sum_T1, out_TH = running
            start = jnp.minimum(index * chunk, capacity - chunk)
            cut = lambda x, row: jax.lax.dynamic_slice_in_dim(x[row], start, chunk, axis=-1)
            k_HC, v_HC = (cut(x, head).astype(jnp.float32) for x in kv)
            k_scale_C, v_scale_C = (cut(x, head) for x in scales)
            is_new_C = start + jnp.arange(chunk) >= index * chunk  # the last chunk may overlap
            visible_TC = cut(mask_BTK, head // num_heads) & is_new_C
            scores_TC = jnp.where(visible_TC, (q_XTH[head] @ k_HC) * k_scale_C, MASK_VALUE)
            new_T1 = jnp.maximum(largest_T1, scores_TC.max(axis=-1, keepdims=True))
            weights_TC, before_T1 = jnp.exp(scores_TC - new_T1), jnp.exp(largest_T1 - new_T1)
            sum_T1 = sum_T1 * before_T1 + weights_TC.sum(axis=-1, keepdims=True)
            return new_T1, sum_T1, out_TH * before_T1 + (weights_TC * v_scale_C) @ v_HC.T

        zeros_T1, zeros_TH = jnp.zeros((num_tokens, 1)), jnp.zeros((num_tokens, width))
        nothing = zeros_T1 + MASK_VALUE, zeros_T1, zeros_TH
        _, sum_T1, out_TH = jax.lax.fori_loop(0, -(-capacity // chunk), fold, nothing)
        return out_TH / sum_T1

    out_XTH = jax.lax.map(attend_head, jnp.arange(len(q_XTH)))
    out_BNTH = out_XTH.reshape(*batch, num_heads, num_tokens, width)
    return jnp.swapaxes(out_BNTH, -3, -2).astype(q_BTNH.dtype)
