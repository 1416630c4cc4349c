"""Attention by two einsums that keeps its weights for the backward pass: the fastest on CPU."""

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention.dropout import Dropout
from perceiver_ar_jax.model.attention.visibility import LEAST_SUM, Visibility, largest_visible


@jax.custom_vjp
def attend(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    visibility: Visibility,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, N, H) and log-sum-exp (B, N, L)."""
    return _forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout)[0]


def _forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout):
    scores_BNLK = jnp.einsum("BLNH,BKNH->BNLK", q_BLNH, k_BKNH, preferred_element_type=jnp.float32)
    scores_BNLK = visibility.hide(scores_BNLK)
    max_BNL1 = largest_visible(scores_BNLK)
    exp_BNLK = jnp.exp(scores_BNLK - max_BNL1)
    sum_BNL1 = jnp.maximum(exp_BNLK.sum(axis=-1, keepdims=True), LEAST_SUM)
    weights_BNLK = (exp_BNLK / sum_BNL1).astype(q_BLNH.dtype)
    lse_BNL = (max_BNL1 + jnp.log(sum_BNL1))[..., 0]
    out_BLNH = jnp.einsum("BNLK,BKNH->BLNH", _dropped(weights_BNLK, dropout), v_BKNH)
    return (out_BLNH, lse_BNL), (q_BLNH, k_BKNH, v_BKNH, weights_BNLK, dropout)


def _backward(saved, gradients):
    # Written out so that the weights are all that is saved per score: autodiff also saves the
    # scores and the mask (5 to 10 % of a training step on CPU).
    q_BLNH, k_BKNH, v_BKNH, weights_BNLK, dropout = saved
    dout_BLNH, dlse_BNL = gradients
    dtype = q_BLNH.dtype
    dweights_BNLK = jnp.einsum(
        "BLNH,BKNH->BNLK", dout_BLNH, v_BKNH, preferred_element_type=jnp.float32
    )
    products_BNLK = weights_BNLK * _dropped(dweights_BNLK, dropout)
    sums_BNL1 = products_BNLK.sum(axis=-1, keepdims=True) - dlse_BNL[..., None]
    dscores_BNLK = (products_BNLK - weights_BNLK * sums_BNL1).astype(dtype)
    dq_BLNH = jnp.einsum("BNLK,BKNH->BLNH", dscores_BNLK, k_BKNH)
    dk_BKNH = jnp.einsum("BNLK,BLNH->BKNH", dscores_BNLK, q_BLNH)
    dv_BKNH = jnp.einsum("BNLK,BLNH->BKNH", _dropped(weights_BNLK, dropout), dout_BLNH)
    return dq_BLNH, dk_BKNH, dv_BKNH, None, None


attend.defvjp(_forward, _backward)


def _dropped(x_BNLK, dropout):
    return x_BNLK if dropout is None else dropout(x_BNLK)
