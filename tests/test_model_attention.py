"""Every implementation of attention against its definition in float64, and the merge of parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import quick_jit, small_config

from perceiver_ar_jax.model.attention import Dropout, Visibility, attend, implementation_for, merge

LATENTS, PREFIX = 4, 3
PADS_BK = np.array([[0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]], bool)
SEGMENTS_BK = np.array([[1, 1, 2, 2, 2, 3, 3], [0, 0, 1, 1, 1, 1, 2]])
CASES = {
    "pads": (PADS_BK, None),
    "documents": (PADS_BK, SEGMENTS_BK),
    "nothing hidden but the future": (None, None),
}


def example(dtype=jnp.float32):
    """Queries of 4 latents, and keys and values of 3 prefix positions and the latents; 4 heads."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, LATENTS, 4, 6), (2, 7, 4, 6), (2, 7, 4, 6)
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def attend_with(implementation, **options):
    config = small_config(attention=implementation)
    return functools.partial(attend, config=config, **options)


def hybrid(attention, pads_BK=PADS_BK, segments_BK=None):
    """The two parts of the hybrid layer, joined."""
    cut = lambda x, part: None if x is None else x[:, part]
    prefix, latents = slice(PREFIX), slice(PREFIX, None)

    def run(q, k, v):
        def part(columns, causal):
            visible = Visibility(
                cut(pads_BK, columns), cut(segments_BK, latents), cut(segments_BK, columns), causal
            )
            return attention(q, k[:, columns], v[:, columns], visible)

        return merge([part(prefix, False), part(latents, True)])

    return run


def definition(q_BLNH, k_BKNH, v_BKNH, pads_BK=PADS_BK, segments_BK=None):
    """Output and log-sum-exp over all keys, right-aligned, hidden keys left out, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BLNH, k_BKNH, v_BKNH))
    visible_BLK = np.tri(LATENTS, 7, PREFIX, bool)[None].repeat(2, axis=0)
    if pads_BK is not None:
        visible_BLK &= ~pads_BK[:, None]
    if segments_BK is not None:
        visible_BLK &= segments_BK[:, PREFIX:, None] == segments_BK[:, None]
    exp_BNLK = np.exp(np.einsum("BLNH,BKNH->BNLK", q, k)) * visible_BLK[:, None]
    sum_BNL = exp_BNLK.sum(-1)
    weights_BNLK = exp_BNLK / sum_BNL[..., None]
    return np.einsum("BNLK,BKNH->BLNH", weights_BNLK, v), np.log(sum_BNL)


def weighted_sum_of(function):
    """A scalar of everything that a function gives, to differentiate."""

    def loss(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return sum((x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum() for x in leaves)

    return loss


def gradients(function, *arguments):
    return quick_jit(jax.grad(weighted_sum_of(function), (0, 1, 2)))(*arguments)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **tolerance), tuple(actual), tuple(expected)
    )


implementations = pytest.mark.parametrize("implementation", ["plain", "recompute", "pallas"])


@implementations
@pytest.mark.parametrize("hidden", CASES.values(), ids=list(CASES))
def test_merged_parts_are_the_softmax_over_all_visible_keys(implementation, hidden):
    run = hybrid(attend_with(implementation), *hidden)
    assert_close(quick_jit(run)(*example()), definition(*example(), *hidden), atol=2e-6)


@implementations
def test_gradients_of_output_and_log_sum_exp_are_those_of_autodiff(implementation):
    def by_autodiff(q, k, v):
        mask_BLK = jnp.tri(LATENTS, 7, PREFIX, bool) & ~PADS_BK[:, None]
        scores = jnp.where(mask_BLK[:, None], jnp.einsum("BLNH,BKNH->BNLK", q, k), -jnp.inf)
        out = jnp.einsum("BNLK,BKNH->BLNH", jax.nn.softmax(scores), v)
        return out, jax.nn.logsumexp(scores, axis=-1)

    ours = gradients(hybrid(attend_with(implementation)), *example())
    assert_close(ours, gradients(by_autodiff, *example()), atol=2e-6)


@implementations
@pytest.mark.parametrize("max_heads", [1, 3])
def test_heads_in_groups_give_the_value_and_gradients_of_all_at_once(implementation, max_heads):
    ours, expected = (
        quick_jit(jax.value_and_grad(weighted_sum_of(hybrid(attention)), (0, 1, 2)))(*example())
        for attention in (
            attend_with(implementation, max_heads=max_heads),
            attend_with(implementation),
        )
    )
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    assert_close(ours[1], expected[1], atol=1e-6)


@implementations
def test_a_query_that_sees_no_key_gives_zero_and_has_no_gradient(implementation):
    all_pads = np.array([[0] * 7, [1] * 5 + [0] * 2], bool)  # its first two queries are pads
    attention = hybrid(attend_with(implementation), all_pads)
    out, _ = quick_jit(attention)(*example())
    assert (out[1, :2] == 0).all()
    dq, dk, dv = gradients(lambda *x: attention(*x)[0], *example())
    assert (dq[1, :2] == 0).all()
    assert (dk[1, :5] == 0).all()
    assert (dv[1, :5] == 0).all()
    assert all(np.isfinite(x).all() for x in (dq, dk, dv))


@implementations
def test_a_prefix_of_nothing_but_pads_changes_nothing(implementation):
    q, k, v = example()
    attention = attend_with(implementation)
    pads = np.zeros((2, 7), bool)
    pads[:, :PREFIX] = True
    out, lse = quick_jit(hybrid(attention, pads))(q, k, v)
    alone = attention(q, k[:, PREFIX:], v[:, PREFIX:], Visibility(causal=True))
    assert_close((out, lse), alone, atol=1e-6)


@implementations
def test_scores_far_beyond_float32_exponentials_stay_finite(implementation):
    q, k, v = example()
    out, _ = quick_jit(hybrid(attend_with(implementation)))(1e4 * q, k, v)
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= np.abs(v).max() * (1 + 1e-6)


@implementations
def test_bf16_inputs_have_their_scores_and_softmax_in_float32(implementation):
    q, k, v = example(dtype=jnp.bfloat16)
    q *= 32  # scores of about 200, where bf16 counts in steps of 1
    out, lse = quick_jit(hybrid(attend_with(implementation)))(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(out.astype(float), definition(q, k, v)[0], atol=0.02)


@implementations
@pytest.mark.parametrize("max_heads", [None, 3], ids=["all", "groups"])
def test_dropped_weights_leave_the_mean_and_heads_drop_different_ones(implementation, max_heads):
    q, k, v = example()
    q, k, v = (jnp.broadcast_to(x[:, :, :1], x.shape) for x in (q, k, v))  # all heads alike
    attention = attend_with(implementation, max_heads=max_heads)

    def drop(seed):
        keys = iter(jax.random.split(jax.random.key(seed)))
        with_dropout = lambda *x: attention(*x, dropout=Dropout(0.5, next(keys)))
        return hybrid(with_dropout)(q, k, v)[0]

    outputs = np.asarray(quick_jit(jax.vmap(drop))(jnp.arange(4000)))
    np.testing.assert_allclose(outputs.mean(0), hybrid(attention)(q, k, v)[0], atol=0.1)
    one_query_NH = outputs[0, 0, -1]
    assert len(np.unique(one_query_NH, axis=0)) == 4
    assert len(np.unique(outputs[:, 0, -1, 0], axis=0)) > 100


def test_gradients_under_dropout_are_those_of_the_weights_that_were_kept():
    arguments = example()
    dropout = Dropout(0.4, jax.random.key(1))

    def by_autodiff(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("BLNH,BKNH->BNLK", q, k))
        return jnp.einsum("BNLK,BKNH->BLNH", dropout(weights), v)

    expected = gradients(by_autodiff, *arguments)
    for implementation in ("plain", "recompute"):
        attention = attend_with(implementation, dropout=dropout)
        ours = gradients(lambda *x, run=attention: run(*x, Visibility())[0], *arguments)
        assert_close(ours, expected, atol=2e-6)


@pytest.mark.parametrize("with_segments", [False, True])
def test_queries_that_are_computed_in_halves_give_what_they_give_at_once(with_segments):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 256, 2, 4), np.float32)
    segments = rng.integers(0, 3, (2, 256)).cumsum(axis=1) // 40 if with_segments else None
    pads = np.arange(256) < np.array([[0], [140]])  # the first half of a row sees nothing
    visible = Visibility(pads, segments, segments, causal=True)

    def results(implementation):
        run = lambda *x: attend_with(implementation)(*x, visible)
        return quick_jit(run)(q, k, v), gradients(run, q, k, v)

    assert "256,256" in str(jax.make_jaxpr(attend_with("recompute"))(q, k, v, visible))
    assert "256,256" not in str(jax.make_jaxpr(attend_with("plain"))(q, k, v, visible))
    for ours, expected in zip(results("plain"), results("recompute"), strict=True):
        assert_close(ours, expected, atol=2e-5)


def chosen(
    platform="cpu", num_queries=4, has_dropout=False, has_segments=False, spread=False, **fields
):
    return implementation_for(
        small_config(**fields),
        num_queries=num_queries,
        platform=platform,
        has_dropout=has_dropout,
        has_segments=has_segments,
        spread_over_context=spread,
    )


def test_auto_recomputes_where_remat_does_and_a_named_implementation_is_taken():
    assert chosen() == "plain"
    assert chosen(remat="names") == "recompute"
    assert chosen(attention="recompute") == "recompute"
    assert chosen(attention="plain", remat="full") == "plain"
    assert chosen(spread=True) == "recompute"


def test_auto_takes_the_kernel_on_a_tpu_where_it_can():
    assert chosen("tpu") == "pallas"
    assert chosen("tpu", attention="plain") == "plain"
    assert chosen("tpu", has_dropout=True) == "recompute"
    assert chosen(attention="pallas", has_dropout=True) == "recompute"
    assert chosen("tpu", num_queries=4096) == "pallas"
    assert chosen("tpu", num_queries=4097) == "recompute"


def test_cudnn_is_taken_where_it_is_named_and_has_a_kernel():
    cudnn = {"attention": "cudnn", "dtype": "bfloat16"}
    assert chosen("gpu", **cudnn) == "cudnn"
    assert chosen("gpu") == "plain"
    assert chosen("gpu", attention="cudnn") == "recompute"  # in float32
    assert chosen("gpu", has_segments=True, **cudnn) == "recompute"
    assert chosen("gpu", num_heads=4, **cudnn) == "recompute"  # heads of 4 channels
