"""What a training step does to its state, and how steps weigh the tokens of a batch."""

import functools

import jax
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config
from small_runs import write_text

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.data import DataConfig, make_loader
from perceiver_ar_jax.tokenizers import ByteTokenizer
from perceiver_ar_jax.training import (
    Batch,
    OptimizerConfig,
    TrainState,
    eval_step,
    make_optimizer,
    token_log_probs,
    train_step,
)

CONFIG = small_config(output_bias=True)
SHARED = {"model": PerceiverAR(CONFIG), "prefix_len": CONFIG.max_prefix_len}
PADS = left_pads([0, 10], CONFIG.max_seq_len)
TOKENS = random_tokens(CONFIG, CONFIG.max_seq_len + 1).astype(np.int32)
BATCH = Batch(tokens=TOKENS[:, :-1], targets=TOKENS[:, 1:], pad_mask=PADS)


def log_probs() -> np.ndarray:
    """By the definition, (B, L)."""
    params = {"params": random_params(CONFIG)}
    logits_BLV = SHARED["model"].apply(params, BATCH.tokens, SHARED["prefix_len"], PADS)
    targets_BL = BATCH.targets[:, SHARED["prefix_len"] :]
    every_BLV = np.asarray(jax.nn.log_softmax(logits_BLV))
    return np.take_along_axis(every_BLV, targets_BL[..., None], axis=2)[..., 0]


def test_log_probs_of_tokens_are_those_of_the_logits():
    actual = quick_jit(functools.partial(token_log_probs, **SHARED))(random_params(CONFIG), BATCH)
    np.testing.assert_allclose(actual, log_probs(), atol=1e-5)


def test_training_and_evaluation_weigh_tokens_alike():
    tx = make_optimizer(OptimizerConfig(warmup_steps=0, total_steps=9))
    state = TrainState.create(params=random_params(CONFIG), tx=tx)

    @quick_jit
    def losses(batch):
        _, metrics = train_step(state, batch, key=jax.random.key(0), **SHARED)
        nats, count = eval_step(state.params, batch, **SHARED)
        return metrics["loss"], metrics["tokens"], nats / count, count

    halves = np.where(PADS, 0, np.arange(CONFIG.max_seq_len) % 3 / 2).astype(np.float32)
    for weights in (None, (~PADS).astype(np.float32), halves):
        counted = ~PADS if weights is None else weights
        weights_BL = counted[:, SHARED["prefix_len"] :].astype(np.float32)
        mean = -(log_probs() * weights_BL).sum() / weights_BL.sum()
        expected = (mean, weights_BL.sum(), mean, weights_BL.sum())
        actual = losses(BATCH.replace(weights=weights))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_step_keeps_every_dtype_of_its_state(param_dtype, microbatches):
    config = small_config(output_bias=True, param_dtype=param_dtype, dtype="bfloat16")
    tx = make_optimizer(OptimizerConfig(warmup_steps=0, total_steps=9, skip_spikes=True))
    state = TrainState.create(params=random_params(config), tx=tx, ema_decay=0.9)
    tokens = random_tokens(config, config.max_seq_len).astype(np.int32)
    batch = Batch(tokens=tokens, targets=tokens, pad_mask=np.zeros(tokens.shape, bool))
    step = functools.partial(
        train_step,
        model=PerceiverAR(config),
        prefix_len=config.max_prefix_len,
        key=jax.random.key(0),
        microbatches=microbatches,
    )
    following, _ = jax.eval_shape(step, state, batch)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert describe(following) == describe(jax.eval_shape(lambda: state))


@pytest.mark.parametrize("respect_documents", [True, False])
def test_the_step_is_compiled_for_what_the_loader_gives(respect_documents, tmp_path):
    config = DataConfig(
        str(write_text(tmp_path)),
        min_seq_len=9,
        max_seq_len=16,
        batch_size=3,
        respect_documents=respect_documents,
    )
    arrays = next(make_loader(config, ByteTokenizer()))
    abstract = Batch.abstract(3, 16, with_segment_ids=respect_documents)
    assert jax.eval_shape(lambda: Batch(**arrays)) == abstract
    np.testing.assert_array_equal(arrays["weights"], ~arrays["pad_mask"])
