"""Segment ids: each document of a window gives what it would give alone."""

import functools

import jax
import numpy as np
import pytest
from sharded_training import mesh_of
from small_models import quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.model.positions import positions_in_segments
from perceiver_ar_jax.parallel import replicated, use_mesh
from perceiver_ar_jax.training import Batch, OptimizerConfig, TrainState, make_optimizer
from perceiver_ar_jax.training.step import eval_step, train_step

LENGTH, PREFIX_LEN = 12, 7
# Documents that end in the prefix, that cross into the latents, that lie among them; pads.
SEGMENT_IDS = np.array(
    [
        [1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3],
        [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4],
        [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ],
    np.int32,
)
PADS = SEGMENT_IDS == 0
CONFIGS = {
    "absolute positions": small_config(),
    "rotary alone, scan, remat": small_config(
        num_self_attention_layers=3,
        abs_pos_emb=False,
        num_self_attention_rotary_layers=-1,
        max_heads_parallel=1,
        scan_layers=True,
        remat="names",
    ),
}
TOKENS = random_tokens(small_config(), LENGTH, batch=len(SEGMENT_IDS))


def documents():
    """(row, columns) of each document that has latents."""
    for row, ids in enumerate(SEGMENT_IDS):
        for document in range(1, ids.max() + 1):
            columns = np.flatnonzero(ids == document)
            if columns[-1] >= PREFIX_LEN:
                yield row, columns


def logits(config, params, tokens=TOKENS, segment_ids=SEGMENT_IDS, pads=PADS, **mode):
    variables = {"params": params}
    return PerceiverAR(config).apply(
        variables, tokens, PREFIX_LEN, pads, segment_ids=segment_ids, **mode
    )


def logits_apart(config, params):
    """Every document as a batch of its own, (latents of it, V) each."""
    model = PerceiverAR(config)
    for row, columns in documents():
        prefix_len = int((columns < PREFIX_LEN).sum())
        yield model.apply({"params": params}, TOKENS[row : row + 1, columns], prefix_len)[0]


def of_documents(logits_BLV):
    for row, columns in documents():
        yield logits_BLV[row, columns[columns >= PREFIX_LEN] - PREFIX_LEN]


def loss(parts):
    """Weighs all logits differently, so that none can make up for another."""
    return sum((part * np.cos(np.arange(part.size)).reshape(part.shape)).sum() for part in parts)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_the_documents_run_apart(name):
    config = CONFIGS[name]

    def together(params):
        parts = list(of_documents(logits(config, params)))
        return loss(parts), parts

    def apart(params):
        parts = list(logits_apart(config, params))
        return loss(parts), parts

    results = [
        quick_jit(jax.grad(run, has_aux=True))(random_params(config)) for run in (together, apart)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=3e-5), *results)


def test_no_gradient_flows_from_one_document_to_another():
    """Through the token embedding, cut so that each position reads a row of its own."""
    config = small_config(vocab_size=LENGTH, max_seq_len=LENGTH)
    tokens = np.arange(LENGTH)[None]
    params = random_params(config)
    head = params["token_embedding"]["embedding"]

    def of_one_latent(embedding, latent):
        embedded = params | {"token_embedding": {"embedding": embedding}}
        hidden_BLD = PerceiverAR(config).apply(
            {"params": embedded},
            tokens,
            config.max_seq_len - config.max_latents,
            segment_ids=SEGMENT_IDS[:1],
            method="hidden",
        )
        return (hidden_BLD[0, latent] * head[0]).sum()

    gradient = quick_jit(jax.grad(of_one_latent))
    for latent in range(config.max_latents):
        column = LENGTH - config.max_latents + latent
        reached = np.abs(gradient(head, latent)).sum(axis=1) > 0
        same = SEGMENT_IDS[0] == SEGMENT_IDS[0, column]
        np.testing.assert_array_equal(reached, same & (np.arange(LENGTH) <= column))


def test_prefix_dropout_drops_segment_ids_with_their_tokens():
    config = small_config(cross_attention_dropout=0.4)
    params = random_params(config)
    run = functools.partial(logits, config, params, deterministic=False)
    run = quick_jit(functools.partial(run, rngs={"dropout": jax.random.key(0)}))
    first = run()
    elsewhere = np.arange(1, 5)[:, None] != SEGMENT_IDS  # not of the document followed
    others = np.where(elsewhere, (TOKENS + 1) % config.vocab_size, TOKENS)
    np.testing.assert_array_equal(
        first[~elsewhere[:, PREFIX_LEN:]], run(others)[~elsewhere[:, PREFIX_LEN:]]
    )


@pytest.mark.parametrize(
    "axes", [{"data": 4, "tensor": 2}, {"data": 2, "context": 4}, {"fsdp": 8}], ids=str
)
def test_sharded_over_eight_devices_the_result_is_the_same(axes):
    config = small_config(remat="names")
    params = random_params(config)
    rows = np.concatenate([SEGMENT_IDS] * 2), np.concatenate([TOKENS] * 2)

    def run(params, segment_ids, tokens):
        parts = logits(config, params, tokens, segment_ids, segment_ids == 0)
        return loss([parts]), parts

    compiled = quick_jit(jax.grad(run, has_aux=True))
    expected = compiled(params, *rows)
    mesh = mesh_of(**axes)
    with use_mesh(mesh):
        actual = compiled(*jax.device_put((params, *rows), replicated(mesh)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), actual, expected)


def test_one_document_is_what_no_segment_ids_give():
    config = CONFIGS["absolute positions"]
    run = quick_jit(functools.partial(logits, config, random_params(config)))
    one = np.where(PADS, 0, 1).astype(np.int32)
    np.testing.assert_array_equal(run(TOKENS, one)[~PADS[:, 7:]], run(TOKENS, None)[~PADS[:, 7:]])


def test_training_and_evaluation_steps_read_the_segment_ids_of_a_batch():
    config = CONFIGS["absolute positions"]
    tx = make_optimizer(OptimizerConfig(warmup_steps=0, total_steps=2))
    state = TrainState.create(params=random_params(config), tx=tx)
    shared = {"model": PerceiverAR(config), "prefix_len": PREFIX_LEN}

    @quick_jit
    def losses(segment_ids):
        batch = Batch(TOKENS, TOKENS, PADS, segment_ids)
        _, metrics = train_step(state, batch, key=jax.random.key(0), **shared)
        nats, count = eval_step(state.params, batch, **shared)
        return metrics["loss"], nats / count

    def expected(params):
        parts = jax.nn.log_softmax(logits(config, params))
        picked = np.take_along_axis(np.asarray(parts), TOKENS[:, PREFIX_LEN:, None], axis=2)[..., 0]
        return -picked[~PADS[:, PREFIX_LEN:]].mean()

    np.testing.assert_allclose(losses(SEGMENT_IDS), expected(state.params), rtol=1e-5)
    assert abs(losses(None)[0] - losses(SEGMENT_IDS)[0]) > 1e-3


def test_positions_begin_anew_with_each_segment():
    positions = positions_in_segments(np.array([[0, 0, 1, 1, 1, 2], [7, 7, 7, 7, 7, 7]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
