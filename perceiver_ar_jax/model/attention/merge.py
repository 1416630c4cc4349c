"""Joins attention to disjoint sets of keys: the softmax over all of them, exactly."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, N, H) and log-sum-exp (B, N, L) over the keys of all parts.

    Args:
      parts: output and log-sum-exp of each part, as an implementation of attention gives them.

    Source: FlashAttention (arXiv 2205.14135), section 3.1.
    """
    if len(parts) == 1:
        return parts[0]
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    return merge_over(lambda x: x.max(axis=0), lambda x: x.sum(axis=0), outs, lses)


def merge_over(
    maximum: Callable, total: Callable, out: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`merge`, whatever the parts are spread over: a leading dimension, or devices of a mesh.

    Args:
      maximum: the largest value over the parts.
      total: the sum over the parts.
      out: outputs, (..., L, N, H).
      lse: log-sum-exps, (..., N, L).
    """
    # The result does not depend on what the exponents are relative to.
    largest = jax.lax.stop_gradient(maximum(jax.lax.stop_gradient(lse)))
    weights = jnp.exp(lse - largest)
    sums = total(weights)
    share = jnp.swapaxes(weights / sums, -1, -2)[..., None]
    return total(share * out).astype(out.dtype), largest + jnp.log(sums)
