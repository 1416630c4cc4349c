"""The seam where implementations of attention plug in, and the plain one.

An implementation is a function of scaled and rotated queries, keys, values and a mask of visible
keys. It computes the softmax in float32 and gives finite values, never NaN, for queries that see
no key at all (padding).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from perceiver_ar_jax.parallel import has_context, on_own_keys, over_devices

KEYS_OF_INPUTS = None, 1, 1, 2  # which dimension of q, k, v and mask is that of the keys
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, or rows without keys become NaN


def attend(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    mask_BLK: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    keep_weights: bool = True,
    over_context: bool = False,
) -> jax.Array:
    """Softmax attention by two einsums. Returns (B, L, N, H).

    Args:
      q_BLNH: queries, scaled and rotated.
      k_BKNH: keys, rotated.
      v_BKNH: values.
      mask_BLK: True where a key is visible; B may be 1.
      dropout_rate: share of the attention weights dropped.
      dropout_key: needed where dropout_rate is not 0.
      keep_weights: False computes them again in the backward pass: less memory, and faster on
        TPUs, slower on CPU.
      over_context: True spreads the keys over the context axis of the mesh, if it has one.
    """
    inputs = q_BLNH, k_BKNH, v_BKNH, mask_BLK
    if dropout_rate == 0.0 and over_context and has_context(k_BKNH.shape[1]):
        return _attend_again(*inputs, True)
    if dropout_rate == 0.0:
        return _attend(*inputs) if keep_weights else _attend_again(*inputs, False)
    weights_BNLK = _weights(q_BLNH, k_BKNH, mask_BLK)
    keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BNLK.shape)
    weights_BNLK = jnp.where(keep, weights_BNLK / max(1.0 - dropout_rate, 1e-9), 0)
    out_BLNH = jnp.einsum("BNLK,BKNH->BLNH", weights_BNLK, v_BKNH)
    return checkpoint_name(out_BLNH, "attention_out")


def attend_by_heads(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    mask_BLK: jax.Array,
    *,
    max_heads: int,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    **options: bool,
) -> jax.Array:
    """`attend`, at most `max_heads` heads at a time: the same result in less memory.

    The backward pass computes each group again, so that there too the weights of one group are
    alive at a time.
    """
    ends = list(range(max_heads, q_BLNH.shape[2], max_heads))
    groups = zip(*(jnp.split(x, ends, axis=2) for x in (q_BLNH, k_BKNH, v_BKNH)), strict=True)
    outputs = []
    for index, (q, k, v) in enumerate(groups):
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)

        def attend_group(q, k, v, key=key):
            return attend(q, k, v, mask_BLK, dropout_rate=dropout_rate, dropout_key=key, **options)

        outputs.append(jax.checkpoint(attend_group)(q, k, v))
    return jnp.concatenate(outputs, axis=2)


def _scores(q_BLNH, k_BKNH, mask_BLK):
    scores_BNLK = jnp.einsum("BLNH,BKNH->BNLK", q_BLNH, k_BKNH, preferred_element_type=jnp.float32)
    return jnp.where(mask_BLK[:, None], scores_BNLK, HIDDEN)


def _weights(q_BLNH, k_BKNH, mask_BLK):
    scores_BNLK = _scores(q_BLNH, k_BKNH, mask_BLK)
    return jax.nn.softmax(scores_BNLK, axis=-1).astype(q_BLNH.dtype)


@jax.custom_vjp
def _attend(q_BLNH, k_BKNH, v_BKNH, mask_BLK):
    return _attend_forward(q_BLNH, k_BKNH, v_BKNH, mask_BLK)[0]


def _attend_forward(q_BLNH, k_BKNH, v_BKNH, mask_BLK):
    weights_BNLK = _weights(q_BLNH, k_BKNH, mask_BLK)
    out_BLNH = jnp.einsum("BNLK,BKNH->BLNH", weights_BNLK, v_BKNH)
    return out_BLNH, (q_BLNH, k_BKNH, v_BKNH, weights_BNLK)


def _attend_backward(saved, dout_BLNH):
    # Written out so that the weights are all that is kept per score: autodiff keeps the scores
    # and the mask beside them (5 to 10 % of a training step on CPU).
    q_BLNH, k_BKNH, v_BKNH, weights_BNLK = saved
    dweights_BNLK = _gradient_of_weights(dout_BLNH, v_BKNH)
    products_BNLK = weights_BNLK * dweights_BNLK
    dscores_BNLK = products_BNLK - weights_BNLK * products_BNLK.sum(axis=-1, keepdims=True)
    return *_gradients(q_BLNH, k_BKNH, weights_BNLK, dscores_BNLK, dout_BLNH), None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_again(q_BLNH, k_BKNH, v_BKNH, mask_BLK, over_context):
    return _attend_again_forward(q_BLNH, k_BKNH, v_BKNH, mask_BLK, over_context)[0]


def _attend_again_forward(q_BLNH, k_BKNH, v_BKNH, mask_BLK, over_context):
    inputs = q_BLNH, k_BKNH, v_BKNH, mask_BLK
    run = functools.partial(_forward_on_keys, None)
    if over_context:
        run = on_own_keys(_forward_on_keys, in_keys=KEYS_OF_INPUTS, out_keys=(None, None, None))
    out_BLNH, *statistics = run(*inputs)
    out_BLNH = checkpoint_name(out_BLNH, "attention_out")
    return out_BLNH, (*inputs, out_BLNH, *checkpoint_name(statistics, "statistics"))


def _attend_again_backward(over_context, saved, dout_BLNH):
    run = functools.partial(_backward_on_keys, None)
    if over_context:
        in_keys = (*KEYS_OF_INPUTS, None, None, None, None)
        run = on_own_keys(_backward_on_keys, in_keys=in_keys, out_keys=(None, 1, 1))
    return *run(*saved, dout_BLNH), None


_attend_again.defvjp(_attend_again_forward, _attend_again_backward)


def _gradient_of_weights(dout_BLNH, v_BKNH):
    return jnp.einsum("BLNH,BKNH->BNLK", dout_BLNH, v_BKNH, preferred_element_type=jnp.float32)


def _gradients(q_BLNH, k_BKNH, weights_BNLK, dscores_BNLK, dout_BLNH):
    dscores_BNLK = dscores_BNLK.astype(q_BLNH.dtype)
    dq_BLNH = jnp.einsum("BNLK,BKNH->BLNH", dscores_BNLK, k_BKNH)
    dk_BKNH = jnp.einsum("BNLK,BLNH->BKNH", dscores_BNLK, q_BLNH)
    dv_BKNH = jnp.einsum("BNLK,BLNH->BKNH", weights_BNLK, dout_BLNH)
    return dq_BLNH, dk_BKNH, dv_BKNH


def _forward_on_keys(axis, q_BLNH, k_BKNH, v_BKNH, mask_BLK):
    """Attention to a device's own keys, joined with that of the other devices on `axis`.

    Each device's softmax is taken against the largest score of all, so that numerators and
    denominators simply add up: the log-sum-exp merge.
    """
    q_BNLH, k_BNKH, v_BNKH = map(_head_major, (q_BLNH, k_BKNH, v_BKNH))
    scores_BNLK = _head_major_scores(q_BNLH, k_BNKH, mask_BLK)
    max_BNL1 = over_devices(jax.lax.pmax, scores_BNLK.max(axis=-1, keepdims=True), axis)
    exp_BNLK = jnp.exp(scores_BNLK - max_BNL1).astype(q_BNLH.dtype)
    # A column of ones beside the values: one matmul gives numerators and denominators.
    values_and_ones = jnp.pad(v_BNKH, [(0, 0)] * 3 + [(0, 1)], constant_values=1)
    sums = jnp.einsum(
        "BNLK,BNKH->BNLH", exp_BNLK, values_and_ones, preferred_element_type=jnp.float32
    )
    sums = over_devices(jax.lax.psum, sums, axis)
    out_BNLH, sum_BNL1 = sums[..., :-1], sums[..., -1:]
    out_BNLH = (out_BNLH / sum_BNL1).astype(q_BNLH.dtype)
    return _head_major(out_BNLH), max_BNL1, sum_BNL1


def _backward_on_keys(
    axis, q_BLNH, k_BKNH, v_BKNH, mask_BLK, out_BLNH, max_BNL1, sum_BNL1, dout_BLNH
):
    """Gradients from what is kept of the softmax, without another sum over keys.

    Weights and their gradients become elementwise ends of matmuls. Source: FlashAttention
    (arXiv 2205.14135), appendix B.2.
    """
    q_BNLH, k_BNKH, v_BNKH, out_BNLH, dout_BNLH = map(
        _head_major, (q_BLNH, k_BKNH, v_BKNH, out_BLNH, dout_BLNH)
    )
    dtype = q_BNLH.dtype
    weights_BNLK = jnp.exp(_head_major_scores(q_BNLH, k_BNKH, mask_BLK) - max_BNL1) / sum_BNL1
    # The barrier keeps the compiler from taking the exponentials again for each use.
    weights_BNLK = jax.lax.optimization_barrier(weights_BNLK.astype(dtype))
    dweights_BNLK = jnp.einsum(
        "BNLH,BNKH->BNLK", dout_BNLH, v_BNKH, preferred_element_type=jnp.float32
    )
    sums_BNL1 = (dout_BNLH.astype(jnp.float32) * out_BNLH).sum(axis=-1, keepdims=True)
    dscores_BNLK = (weights_BNLK * (dweights_BNLK - sums_BNL1)).astype(dtype)
    dq_BNLH = jnp.einsum("BNLK,BNKH->BNLH", dscores_BNLK, k_BNKH)
    dk_BNKH = jnp.einsum("BNLK,BNLH->BNKH", dscores_BNLK, q_BNLH)
    dv_BNKH = jnp.einsum("BNLK,BNLH->BNKH", weights_BNLK, dout_BNLH)
    dq_BNLH = over_devices(jax.lax.psum, dq_BNLH, axis)
    return tuple(map(_head_major, (dq_BNLH, dk_BNKH, dv_BNKH)))


def _head_major_scores(q_BNLH, k_BNKH, mask_BLK):
    scores_BNLK = jnp.einsum("BNLH,BNKH->BNLK", q_BNLH, k_BNKH, preferred_element_type=jnp.float32)
    return jnp.where(mask_BLK[:, None], scores_BNLK, HIDDEN)


def _head_major(x_BLNH):
    """Swaps positions and heads: heads before positions is the order that batched matmuls want."""
    return jnp.swapaxes(x_BLNH, 1, 2)
