"""Attention by einsums that computes its weights again in the backward pass.

Less memory than `plain`, and faster on TPUs; slower on CPU. With a mesh axis it is attention to
keys spread over the devices of that axis.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from perceiver_ar_jax.model.attention.dropout import Dropout
from perceiver_ar_jax.model.attention.merge import merge
from perceiver_ar_jax.model.attention.visibility import LEAST_SUM, Visibility, largest_visible
from perceiver_ar_jax.parallel import on_own_keys

WHOLE = PartitionSpec()  # the same on all devices of the axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    visibility: Visibility,
    dropout: Dropout | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, N, H) and log-sum-exp (B, N, L).

    Args:
      q_BLNH: queries, scaled and rotated.
      k_BKNH: keys, rotated.
      v_BKNH: values.
      visibility: which keys a query sees.
      dropout: of the weights.
      axis: the mesh axis over whose devices the keys are spread, K a multiple of their number.
    """
    return _forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout, axis)[0]


def _forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout, axis):
    run = functools.partial(forward, axis=axis)
    if axis is not None:
        in_specs = _specs_of_inputs(visibility, axis)
        run = on_own_keys(run, axis, in_specs=in_specs, out_specs=(WHOLE, WHOLE))
    out_BLNH, lse_BNL = run(q_BLNH, k_BKNH, v_BKNH, visibility, dropout)
    out_BLNH = checkpoint_name(out_BLNH, "attention_out")
    lse_BNL = checkpoint_name(lse_BNL, "statistics")
    return (out_BLNH, lse_BNL), (q_BLNH, k_BKNH, v_BKNH, visibility, dropout, out_BLNH, lse_BNL)


def _backward(axis, saved, gradients):
    _, _, _, visibility, *_ = saved
    run = functools.partial(backward, axis=axis)
    if axis is not None:
        keys = PartitionSpec(None, axis)
        in_specs = (*_specs_of_inputs(visibility, axis), WHOLE, WHOLE, WHOLE, WHOLE)
        run = on_own_keys(run, axis, in_specs=in_specs, out_specs=(WHOLE, keys, keys))
    return *run(*saved, *gradients), None, None


attend.defvjp(_forward, _backward)


def forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout=None, *, axis=None):
    """Output and log-sum-exp, not differentiable; within `shard_map` where there is an axis."""
    q_BNLH, k_BNKH, v_BNKH = map(_head_major, (q_BLNH, k_BKNH, v_BKNH))
    scores_BNLK = _scores(q_BNLH, k_BNKH, visibility)
    max_BNL1 = largest_visible(scores_BNLK)
    exp_BNLK = jnp.exp(scores_BNLK - max_BNL1).astype(q_BNLH.dtype)
    # A column of ones beside the values: one matmul gives numerators and denominators.
    values_and_ones = jnp.pad(v_BNKH, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
    sums = _product("BNLK,BNKH->BNLH", exp_BNLK, values_and_ones)
    out_BNLH, sum_BNL1 = sums[..., :-1], jnp.maximum(sums[..., -1:], LEAST_SUM)
    if dropout is not None:
        dropped_BNLK = _own(dropout, axis)(exp_BNLK)
        out_BNLH = _product("BNLK,BNKH->BNLH", dropped_BNLK, v_BNKH)
    out_BLNH = _head_major(out_BNLH / sum_BNL1)
    lse_BNL = (max_BNL1 + jnp.log(sum_BNL1))[..., 0]
    if axis is not None:
        out_BLNH, lse_BNL = merge([(out_BLNH, lse_BNL)], axis)
    return out_BLNH.astype(q_BLNH.dtype), lse_BNL


def backward(
    q_BLNH,
    k_BKNH,
    v_BKNH,
    visibility,
    dropout,
    out_BLNH,
    lse_BNL,
    dout_BLNH,
    dlse_BNL,
    *,
    axis=None,
):
    """Gradients of queries, keys and values from the log-sum-exp, without another sum over keys.

    Weights and their gradients become elementwise ends of matmuls. Source: FlashAttention
    (arXiv 2205.14135), appendix B.2.
    """
    q_BNLH, k_BNKH, v_BNKH, out_BNLH, dout_BNLH = map(
        _head_major, (q_BLNH, k_BKNH, v_BKNH, out_BLNH, dout_BLNH)
    )
    dtype = q_BNLH.dtype
    weights_BNLK = jnp.exp(_scores(q_BNLH, k_BNKH, visibility) - lse_BNL[..., None])
    # The barrier keeps the compiler from taking the exponentials again for each use.
    weights_BNLK = jax.lax.optimization_barrier(weights_BNLK.astype(dtype))
    dweights_BNLK = _product("BNLH,BNKH->BNLK", dout_BNLH, v_BNKH)
    dropped_BNLK = weights_BNLK
    if dropout is not None:
        drop = _own(dropout, axis)
        dweights_BNLK, dropped_BNLK = drop(dweights_BNLK), drop(weights_BNLK)
    # The gradient of the log-sum-exp joins the row sums of the softmax's.
    sums_BNL1 = (dout_BNLH.astype(jnp.float32) * out_BNLH).sum(axis=-1, keepdims=True)
    sums_BNL1 -= dlse_BNL[..., None]
    dscores_BNLK = (weights_BNLK * (dweights_BNLK - sums_BNL1)).astype(dtype)
    dq_BNLH = jnp.einsum("BNLK,BNKH->BNLH", dscores_BNLK, k_BNKH)
    dk_BNKH = jnp.einsum("BNLK,BNLH->BNKH", dscores_BNLK, q_BNLH)
    dv_BNKH = jnp.einsum("BNLK,BNLH->BNKH", dropped_BNLK, dout_BNLH)
    if axis is not None:
        dq_BNLH = jax.lax.psum(dq_BNLH, axis)
    return tuple(map(_head_major, (dq_BNLH, dk_BNKH, dv_BNKH)))


def _specs_of_inputs(visibility, axis):
    """How queries, keys, values, visibility and dropout lie on the devices of an axis."""
    keys = PartitionSpec(None, axis)
    of_visibility = visibility.replace(pad_mask_BK=keys, segment_ids_BL=WHOLE, segment_ids_BK=keys)
    return WHOLE, keys, keys, of_visibility, WHOLE


def _own(dropout, axis):
    """Each device draws for its own keys."""
    return dropout if axis is None else dropout.fold_in(jax.lax.axis_index(axis))


def _scores(q_BNLH, k_BNKH, visibility):
    return visibility.hide(_product("BNLH,BNKH->BNLK", q_BNLH, k_BNKH))


def _product(spec, x, y):
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _head_major(x_BLNH):
    """Swaps positions and heads: heads before positions is the order that batched matmuls want."""
    return jnp.swapaxes(x_BLNH, 1, 2)
