from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention.visibility import MASK_VALUE

# Of queries (B, L, N, H) to keys that it knows: output (B, L, N, H) and log-sum-exp (B, N, L).
Attention = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def merge(
    parts: Sequence[tuple[jax.Array, jax.Array]], axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Joins attention to disjoint sets of keys: exactly the softmax over all of them.

    Args:
      parts: output (B, L, N, H) and log-sum-exp (B, N, L) of each part, as an implementation of
        attention gives them.
      axis: a mesh axis, each of whose devices holds other parts; inside `shard_map`.

    Returns:
      Output, in the dtype of the parts', and log-sum-exp over the keys of all parts.

    Source: FlashAttention (arXiv 2205.14135), section 3.1.
    """
    if len(parts) == 1 and axis is None:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    # What the exponents are relative to does not change the result.
    largest_BNL = jax.lax.stop_gradient(jnp.stack(lses).max(axis=0))
    if axis is not None:
        largest_BNL = jax.lax.pmax(largest_BNL, axis)
    weights = [jnp.exp(lse_BNL - largest_BNL) for lse_BNL in lses]
    sum_BNL = _total(weights, axis)
    shares = [jnp.swapaxes(weight_BNL / sum_BNL, 1, 2)[..., None] for weight_BNL in weights]
    out_BLNH = _total([share * out for share, out in zip(shares, outs, strict=True)], axis)
    return out_BLNH.astype(outs[0].dtype), largest_BNL + jnp.log(sum_BNL)


def attend_to_nothing(q_BLNH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What attention to no key gives: 0, and a log-sum-exp to which `merge` gives no weight."""
    batch, latents, heads, _ = q_BLNH.shape
    return jnp.zeros_like(q_BLNH), jnp.full((batch, heads, latents), MASK_VALUE / 2)


def _total(terms, axis):
    total = sum(terms[1:], start=terms[0])
    return total if axis is None else jax.lax.psum(total, axis)
