"""A program that uses the public names, for the type checker of `make test`: nothing runs it.

What `perceiver_ar_jax/py.typed` promises is checked from where it matters, a user's code.
"""

from collections.abc import Iterator
from typing import Any, assert_type

import jax
import numpy as np
import optax

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig, Pretrained, generate, load_pretrained
from perceiver_ar_jax.conversion import read_reference, to_flax, write_reference
from perceiver_ar_jax.convert import convert_from_torch, convert_to_torch
from perceiver_ar_jax.generation import stream
from perceiver_ar_jax.tokenizers import Tokenizer, load_tokenizer
from perceiver_ar_jax.training import (
    Batch,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    train_step,
)


def make_a_model(tokens_BS: jax.Array, key: jax.Array) -> jax.Array:
    """A model from its config, and its logits."""
    config = PerceiverARConfig(vocab_size=32000, max_seq_len=1024, max_latents=512)
    assert_type(config.head_dim, int)
    assert_type(config.replace(dtype="bfloat16"), PerceiverARConfig)
    assert_type(PerceiverARConfig.clm_base(), PerceiverARConfig)
    model = PerceiverAR(config)
    params = model.init(key, tokens_BS, prefix_len=512)["params"]
    return model(tokens_BS, prefix_len=512, pad_mask=None) + model.logits(params["hidden"])


def decode(path: str) -> str:
    """A checkpoint's continuation of a prompt."""
    pretrained = load_pretrained(path)
    assert_type(pretrained, Pretrained)
    assert_type(pretrained.model, PerceiverAR)
    assert_type(pretrained.step, int)
    tokenizer = load_tokenizer("bytes")
    assert_type(tokenizer, Tokenizer)
    prompt = [tokenizer.encode("The river")]
    model, params = pretrained.model, pretrained.params
    tokens = generate(model, params, prompt, max_new_tokens=16, num_latents=2, do_sample=True)
    tokens_BT: np.ndarray = generate(model, params, np.asarray(prompt), rng=jax.random.key(0))
    each: Iterator[Any] = stream(model, params, prompt)
    return tokenizer.decode(np.asarray(tokens_BT)[0]) + str(tokens) + str(list(each))


def train(params: dict[str, Any], batch: Batch, model: PerceiverAR, key: jax.Array) -> TrainState:
    """One step."""
    optimizer = OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, total_steps=50_000)
    tx = make_optimizer(optimizer)
    assert_type(tx, optax.GradientTransformation)
    state = TrainState.create(params=params, tx=tx)
    assert_type(state, TrainState)
    state, metrics = train_step(state, batch, model=model, prefix_len=512, key=key)
    assert_type(metrics["loss"], jax.Array)
    return state


def convert(source: str) -> None:
    """Both directions, verified, and the steps in between."""
    certificate: dict[str, Any] = convert_from_torch(source, "ours", dtype="bfloat16")
    certificate = convert_to_torch("ours", "theirs", verify_rows=None)
    reference = read_reference(source)
    assert_type(reference.config, PerceiverARConfig)
    params = to_flax(reference.tensors, reference.config)
    write_reference(certificate["folder"], params, reference.config, overwrite=True)
