"""A prefix read in chunks gives the same as one read at once, in memory of a chunk."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR, generate
from perceiver_ar_jax.model.attention import Dropout, recompute
from perceiver_ar_jax.model.inputs import Inputs
from perceiver_ar_jax.model.streamed_prefix import PrefixParams
from perceiver_ar_jax.model.streamed_prefix import attend as attend_streamed

LENGTH, PREFIX_LEN = 40, 34
PADS = left_pads([0, 13], LENGTH)
DOCUMENTS = np.array([[1] * 20 + [2] * 12 + [3] * 8, [0] * 13 + [1] * 10 + [2] * 12 + [3] * 5])
CONFIG = small_config(max_seq_len=LENGTH)


def logits_and_gradients(config, pads=PADS, segment_ids=None, key=None):
    params, tokens = random_params(config), random_tokens(config, LENGTH)

    def loss(params):
        logits = PerceiverAR(config).apply(
            {"params": params},
            tokens,
            PREFIX_LEN,
            pads,
            segment_ids=segment_ids,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )
        return -jax.nn.log_softmax(logits)[..., 0].mean(), logits

    (_, logits), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, gradients


def assert_close(actual, expected, tolerance=1e-5):
    def compare(x, y):
        largest = np.abs(np.asarray(y, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=tolerance * largest
        )

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("chunk", [1, 16, 17, 33], ids="chunks of {}".format)
@pytest.mark.parametrize(
    ("changes", "pads", "segment_ids"),
    [
        ({}, None, None),
        ({}, PADS, None),
        ({"abs_pos_emb": False}, PADS, None),
        ({"abs_pos_emb": False}, PADS, DOCUMENTS),
    ],
    ids=["no pads", "absolute positions", "rotary positions alone", "documents"],
)
def test_logits_and_gradients_are_those_of_a_prefix_read_at_once(changes, pads, segment_ids, chunk):
    config = CONFIG.replace(**changes)
    expected = logits_and_gradients(config, pads, segment_ids)
    assert_close(
        logits_and_gradients(config.replace(prefix_chunk=chunk), pads, segment_ids), expected
    )


@pytest.mark.parametrize("remat", ["full", "names"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_switches_that_save_memory_change_nothing(remat, scan_layers):
    config = CONFIG.replace(prefix_chunk=8, remat=remat, scan_layers=scan_layers)
    assert_close(logits_and_gradients(config), logits_and_gradients(CONFIG))


@pytest.mark.parametrize("segment_ids", [None, DOCUMENTS], ids=["pads", "documents"])
def test_a_kernel_reads_each_chunk_where_attention_is_a_kernel(segment_ids):
    config = CONFIG.replace(prefix_chunk=16, attention="pallas")
    expected = logits_and_gradients(CONFIG, segment_ids=segment_ids)
    with mock.patch.object(recompute, "forward", side_effect=AssertionError):
        assert_close(logits_and_gradients(config, segment_ids=segment_ids), expected)
    dropped = config.replace(post_attention_dropout=0.3)  # which the kernel cannot
    key = jax.random.key(0)
    by_einsums = dropped.replace(attention="recompute")
    assert_close(logits_and_gradients(dropped, key=key), logits_and_gradients(by_einsums, key=key))


def test_prefix_dropout_reads_the_same_positions():
    config, key = CONFIG.replace(cross_attention_dropout=0.3), jax.random.key(3)
    expected = logits_and_gradients(config, key=key)
    assert_close(logits_and_gradients(config.replace(prefix_chunk=5), key=key), expected)


def test_bfloat16_is_as_close_as_when_read_at_once():
    in_float32 = logits_and_gradients(CONFIG)[0]
    config = CONFIG.replace(dtype="bfloat16")
    errors = [
        np.abs(logits_and_gradients(config.replace(prefix_chunk=chunk))[0] - in_float32).mean()
        for chunk in (0, 1)
    ]
    assert errors[1] < 1.5 * errors[0]


def test_dropped_attention_weights_have_the_gradient_of_their_own_draw():
    """Against differences: the two passes over a chunk must draw the same weights."""
    config = CONFIG.replace(prefix_chunk=8, post_attention_dropout=0.4)
    params = random_params(config)
    layer = params["cross_attention"]
    projections = {name: layer["attention"][name] for name in ("k_proj", "v_proj")}
    tables = tuple(params[name]["embedding"] for name in ("token_embedding", "position_embedding"))
    prefix_params = PrefixParams(tables, {"kv_norm": layer["kv_norm"], "attention": projections})
    prefix, _ = Inputs.of(jnp.asarray(random_tokens(config, LENGTH)), PADS).split(PREFIX_LEN)
    q_BLNH = jax.random.normal(jax.random.key(1), (2, 6, config.num_heads, config.head_dim))
    dropout = Dropout(0.4, jax.random.key(2))

    def value(params, by, direction, dropout=dropout):
        moved = jax.tree.map(lambda x, step: x + by * step, params, direction)
        out_BLNH, lse_BNL = attend_streamed(q_BLNH, moved, prefix, None, config, dropout)
        return (out_BLNH**2).sum() + lse_BNL.sum()

    direction = jax.tree.map(
        lambda x: 0.3 * np.cos(np.arange(x.size)).reshape(x.shape), prefix_params
    )
    by = 1e-3
    values = [quick_jit(value)(prefix_params, sign * by, direction) for sign in (-1, 1)]
    slope = quick_jit(jax.grad(value, argnums=1))(prefix_params, 0.0, direction)
    np.testing.assert_allclose((values[1] - values[0]) / (2 * by), slope, rtol=3e-3)
    assert np.abs(quick_jit(value)(prefix_params, by, direction, None) - values[1]) > 1


def temporary_bytes(prefix_len, prefix_chunk):
    """What a compiled gradient takes beside its arguments and results."""
    config = small_config(
        max_seq_len=prefix_len + 8,
        max_latents=8,
        abs_pos_emb=False,
        prefix_chunk=prefix_chunk,
    )

    def loss(params, tokens):
        logits = PerceiverAR(config).apply({"params": params}, tokens, prefix_len)
        return jax.nn.logsumexp(logits)

    tokens = jax.ShapeDtypeStruct((1, config.max_seq_len), jnp.int32)
    compiled = quick_jit(jax.grad(loss)).lower(random_params(config), tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_a_gradient_does_not_grow_with_the_prefix():
    a_million = 2**20
    ids_and_positions = 2 * 4 * a_million
    streamed = temporary_bytes(a_million, 1024) - temporary_bytes(2**14, 1024)
    assert streamed <= ids_and_positions
    # Read at once, the keys alone take 16 channels of 4 bytes a position.
    assert temporary_bytes(2**14, 0) - temporary_bytes(2**13, 0) > 2**13 * 16 * 4


@pytest.mark.parametrize("policy", ["slide", "reset"])
def test_a_prompt_read_in_chunks_is_continued_the_same(policy):
    config = small_config(max_seq_len=80, max_latents=8, abs_pos_emb=False)
    params, prompt = random_params(config), [list(range(40)), list(range(5, 20))]
    tokens = [
        generate(
            PerceiverAR(config.replace(prefix_chunk=chunk)),
            params,
            prompt,
            max_new_tokens=20,
            num_latents=4,
            policy=policy,
        )
        for chunk in (0, 16)
    ]
    np.testing.assert_array_equal(*tokens)
