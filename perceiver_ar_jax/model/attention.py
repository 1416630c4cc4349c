"""The seam where implementations of attention plug in, and the plain one.

An implementation is a function of scaled and rotated queries, keys, values and a mask of visible
keys. It computes the softmax in float32 and gives finite values, never NaN, for queries that see
no key at all (padding).
"""

import jax
import jax.numpy as jnp

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, or rows without keys become NaN


def attend(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    mask_BLK: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention by two einsums. Returns (B, L, N, H).

    Args:
      q_BLNH: queries, scaled and rotated.
      k_BKNH: keys, rotated.
      v_BKNH: values.
      mask_BLK: True where a key is visible; B may be 1.
      dropout_rate: share of the attention weights dropped.
      dropout_key: needed where dropout_rate is not 0.
    """
    if dropout_rate == 0.0:
        return _attend(q_BLNH, k_BKNH, v_BKNH, mask_BLK)
    weights_BNLK = _weights(q_BLNH, k_BKNH, mask_BLK)
    keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights_BNLK.shape)
    weights_BNLK = jnp.where(keep, weights_BNLK / max(1.0 - dropout_rate, 1e-9), 0)
    return jnp.einsum("BNLK,BKNH->BLNH", weights_BNLK, v_BKNH)


def attend_by_heads(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    mask_BLK: jax.Array,
    *,
    max_heads: int,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
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
            return attend(q, k, v, mask_BLK, dropout_rate=dropout_rate, dropout_key=key)

        outputs.append(jax.checkpoint(attend_group)(q, k, v))
    return jnp.concatenate(outputs, axis=2)


def _weights(q_BLNH, k_BKNH, mask_BLK):
    scores_BNLK = jnp.einsum("BLNH,BKNH->BNLK", q_BLNH, k_BKNH, preferred_element_type=jnp.float32)
    scores_BNLK = jnp.where(mask_BLK[:, None], scores_BNLK, HIDDEN)
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
    dv_BKNH = jnp.einsum("BNLK,BLNH->BKNH", weights_BNLK, dout_BLNH)
    dweights_BNLK = jnp.einsum(
        "BLNH,BKNH->BNLK", dout_BLNH, v_BKNH, preferred_element_type=jnp.float32
    )
    products_BNLK = weights_BNLK * dweights_BNLK
    dscores_BNLK = products_BNLK - weights_BNLK * products_BNLK.sum(axis=-1, keepdims=True)
    dscores_BNLK = dscores_BNLK.astype(q_BLNH.dtype)
    dq_BLNH = jnp.einsum("BNLK,BKNH->BLNH", dscores_BNLK, k_BKNH)
    dk_BKNH = jnp.einsum("BNLK,BLNH->BKNH", dscores_BNLK, q_BLNH)
    return dq_BLNH, dk_BKNH, dv_BKNH, None


_attend.defvjp(_attend_forward, _attend_backward)
