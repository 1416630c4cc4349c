"""What a training step does to its state."""

import functools

import jax
import numpy as np
import pytest
from small_models import random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.training import Batch, OptimizerConfig, TrainState, make_optimizer, train_step


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
