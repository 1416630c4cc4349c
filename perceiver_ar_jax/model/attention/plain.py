"""Attention by two einsums that keeps its exponentials for the backward pass: the fastest on CPU.

Heads stand before positions, and the gradients of keys and values come out transposed. Otherwise
XLA transposes the weights and their gradients for its matmuls, which takes as long as a matmul.
"""

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention.dropout import Dropout
from perceiver_ar_jax.model.attention.visibility import LEAST_SUM, Visibility, largest_visible
from perceiver_ar_jax.model.products import product
from perceiver_ar_jax.parallel import platform_in_use


def attend(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    visibility: Visibility,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, N, H) and log-sum-exp (B, N, L)."""
    length = q_BLNH.shape[1]
    in_halves = visibility.causal and dropout is None and length >= 256 and length % 2 == 0
    if not in_halves or platform_in_use() != "cpu":
        return _attend(q_BLNH, k_BKNH, v_BKNH, visibility, dropout)
    # The first half of the queries sees no key of the second half. More and smaller blocks take as
    # long, and longer to compile.
    half = length // 2
    seen_by_first = visibility.of_queries(0, half)
    seen_by_second = visibility.of_queries(half, length)
    halves = (
        _attend(q_BLNH[:, :half], k_BKNH[:, :half], v_BKNH[:, :half], seen_by_first, None),
        _attend(q_BLNH[:, half:], k_BKNH, v_BKNH, seen_by_second, None),
    )
    outs, lses = zip(*halves, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)


@jax.custom_vjp
def _attend(q_BLNH, k_BKNH, v_BKNH, visibility, dropout):
    return _forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout)[0]


def _forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout):
    q_BNLH, k_BNKH, v_BNKH = map(_swap, (q_BLNH, k_BKNH, v_BKNH))
    dtype = q_BLNH.dtype
    scores_BNLK = visibility.hide(_matmul("BNLH,BNKH->BNLK", q_BNLH, k_BNKH))
    max_BNL1 = largest_visible(scores_BNLK)
    exp_BNLK = jnp.exp(scores_BNLK - max_BNL1)
    sum_BNL1 = jnp.maximum(exp_BNLK.sum(axis=-1, keepdims=True), LEAST_SUM)
    exp_BNLK = exp_BNLK.astype(dtype)
    # Dividing the output by the sum saves a pass over the weights.
    out_BNLH = _matmul("BNLK,BNKH->BNLH", _dropped(exp_BNLK, dropout), v_BNKH) / sum_BNL1
    lse_BNL = (max_BNL1 + jnp.log(sum_BNL1))[..., 0]
    saved = q_BNLH, k_BNKH, v_BNKH, exp_BNLK, sum_BNL1, dropout
    return (_swap(out_BNLH.astype(dtype)), lse_BNL), saved


def _backward(saved, gradients):
    # Written out so that the exponentials are all that is saved per score: autodiff also saves the
    # scores and the mask.
    q_BNLH, k_BNKH, v_BNKH, exp_BNLK, sum_BNL1, dropout = saved
    dout_BLNH, dlse_BNL = gradients
    dtype = q_BNLH.dtype
    dout_BNLH = (_swap(dout_BLNH) / sum_BNL1).astype(dtype)
    dexp_BNLK = _dropped(_matmul("BNLH,BNKH->BNLK", dout_BNLH, v_BNKH), dropout)
    products_BNLK = exp_BNLK * dexp_BNLK
    mean_BNL1 = (products_BNLK.sum(axis=-1, keepdims=True) - dlse_BNL[..., None]) / sum_BNL1
    dscores_BNLK = (products_BNLK - exp_BNLK * mean_BNL1).astype(dtype)
    dq_BNLH = product("BNLK,BNKH->BNLH", dscores_BNLK, k_BNKH)
    dk_BNHK = product("BNLH,BNLK->BNHK", q_BNLH, dscores_BNLK)
    dv_BNHK = product("BNLH,BNLK->BNHK", dout_BNLH, _dropped(exp_BNLK, dropout))
    dk_BKNH, dv_BKNH = (jnp.transpose(x_BNHK, (0, 3, 1, 2)) for x_BNHK in (dk_BNHK, dv_BNHK))
    return _swap(dq_BNLH), dk_BKNH, dv_BKNH, None, None


_attend.defvjp(_forward, _backward)


def _matmul(subscripts, a, b):
    return product(subscripts, a, b, jnp.float32)


def _swap(x_BLNH):
    return jnp.swapaxes(x_BLNH, 1, 2)


def _dropped(x_BNLK, dropout):
    return x_BNLK if dropout is None else dropout(x_BNLK)
