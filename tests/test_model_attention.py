import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import quick_jit

from perceiver_ar_jax.model import masks
from perceiver_ar_jax.model.attention import attend, attend_by_heads

PADS = np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]], bool)


def example(num_queries=4, dtype=jnp.float32):
    """Queries, keys, values and a causal mask of 2 rows, 4 heads and 7 keys, 2 of them padded."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, num_queries, 4, 6), (2, 7, 4, 6), (2, 7, 4, 6)
    q, k, v = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
    return q, k, v, masks.causal(num_queries, 7, PADS)


def plain(q_BLNH, k_BKNH, v_BKNH, mask_BLK):
    """The definition, in float64, without a masked softmax: invisible keys have weight 0."""
    scores_BNLK = np.einsum(
        "BLNH,BKNH->BNLK", *(np.asarray(x, np.float64) for x in (q_BLNH, k_BKNH))
    )
    weights_BNLK = np.exp(scores_BNLK) * np.asarray(mask_BLK)[:, None]
    weights_BNLK /= weights_BNLK.sum(-1, keepdims=True)
    return np.einsum("BNLK,BKNH->BLNH", weights_BNLK, np.asarray(v_BKNH, np.float64))


def weighted_sum_of(attention):
    """A scalar of everything that an implementation gives, to differentiate."""

    def loss(q, k, v, mask):
        out = attention(q, k, v, mask)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    return loss


def test_attention_is_a_softmax_over_the_visible_keys():
    np.testing.assert_allclose(quick_jit(attend)(*example()), plain(*example()), atol=1e-6)


def test_its_own_backward_pass_gives_the_gradients_of_autodiff():
    def by_autodiff(q, k, v, mask):
        scores = jnp.where(mask[:, None], jnp.einsum("BLNH,BKNH->BNLK", q, k), -jnp.inf)
        return jnp.einsum("BNLK,BKNH->BLNH", jax.nn.softmax(scores), v)

    ours, expected = (
        quick_jit(jax.grad(weighted_sum_of(f), (0, 1, 2)))(*example())
        for f in (attend, by_autodiff)
    )
    for actual, gradient in zip(ours, expected, strict=True):
        np.testing.assert_allclose(actual, gradient, atol=1e-6)


@pytest.mark.parametrize("max_heads", [1, 2, 3])
def test_heads_in_groups_give_the_value_and_gradients_of_all_at_once(max_heads):
    in_groups = functools.partial(attend_by_heads, max_heads=max_heads)
    ours, expected = (
        quick_jit(jax.value_and_grad(weighted_sum_of(f), (0, 1, 2)))(*example())
        for f in (in_groups, attend)
    )
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    for actual, gradient in zip(ours[1], expected[1], strict=True):
        np.testing.assert_allclose(actual, gradient, atol=1e-6)


def test_a_query_that_sees_no_key_is_finite_and_so_are_its_gradients():
    q, k, v, mask = example(num_queries=7)
    assert not mask[1, 0].any()
    assert np.isfinite(attend(q, k, v, mask)).all()
    gradients = quick_jit(jax.grad(weighted_sum_of(attend), (0, 1, 2)))(q, k, v, mask)
    assert all(np.isfinite(x).all() for x in gradients)


def test_scores_far_beyond_float32_exponentials_stay_finite():
    q, k, v, mask = example()
    out = attend(1e4 * q, k, v, mask)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(v).max()


def test_bf16_inputs_have_their_scores_and_softmax_in_float32():
    q, k, v, mask = example(dtype=jnp.bfloat16)
    q *= 32  # scores of about 200, where bf16 counts in steps of 1
    out = quick_jit(attend)(q, k, v, mask)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(float), plain(q, k, v, mask), atol=0.02)


@pytest.mark.parametrize(
    "attention", [attend, functools.partial(attend_by_heads, max_heads=3)], ids=["all", "groups"]
)
def test_dropped_weights_leave_the_mean_and_heads_drop_different_ones(attention):
    q, k, v, mask = example()
    q, k, v = (jnp.broadcast_to(x[:, :, :1], x.shape) for x in (q, k, v))  # all heads alike

    def drop(seed):
        return attention(q, k, v, mask, dropout_rate=0.5, dropout_key=jax.random.key(seed))

    outputs = np.asarray(quick_jit(jax.vmap(drop))(jnp.arange(4000)))
    np.testing.assert_allclose(outputs.mean(0), attention(q, k, v, mask), atol=0.1)
    one_query_NH = outputs[0, 0, -1]
    assert len(np.unique(one_query_NH, axis=0)) == 4
    assert len(np.unique(outputs[:, 0, -1, 0], axis=0)) > 100
