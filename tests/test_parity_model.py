import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    assert_close_to_reference,
    cached_logit_errors,
    clm,
    gradient_errors,
    logit_errors,
    our_model,
    random_config,
    random_input,
    reference_config,
    reference_logits,
    reference_model,
    torch,
)
from small_models import quick_jit

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.conversion.perceiver_io import PERCEIVER_IO
from perceiver_ar_jax.model import init_params, perceiver_ar


@pytest.mark.parametrize("seed", range(60))
def test_logits_are_those_of_perceiver_io(seed):
    assert np.max(logit_errors(seed)) <= 2e-5


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_all_parameters_are_those_of_perceiver_io(seed):
    errors = gradient_errors(seed)
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}


@pytest.mark.parametrize("seed", range(6))
def test_cached_decoding_gives_the_logits_of_perceiver_io_past_all_limits(seed):
    assert np.max(cached_logit_errors(seed)) <= 2e-5


def test_training_mode_is_that_of_perceiver_io_where_the_same_prefix_columns_drop(monkeypatch):
    config = random_config(0, max_latents=5, max_seq_len=14, cross_attention_dropout=0.4)
    reference = reference_model(config, 0).train()
    model, params = our_model(reference, config)
    tokens, prefix_len, pads = random_input(config, 0, lengths=(9, 5))

    draws = torch.rand(len(tokens), prefix_len)
    kept = draws.topk(prefix_len - int(prefix_len * 0.4)).indices.sort().values.numpy()
    latents = np.broadcast_to(np.arange(9, 14), (len(tokens), 5))
    columns = jnp.asarray(np.concatenate([kept, latents], axis=1))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draws)
    monkeypatch.setattr(perceiver_ar, "_kept_columns", lambda *_: columns)

    with torch.no_grad():
        expected = reference_logits(reference, tokens, prefix_len, pads)
    actual = quick_jit(
        lambda key: model.apply(
            {"params": params}, tokens, prefix_len, pads, deterministic=False, rngs={"dropout": key}
        )
    )(jax.random.key(0))
    assert_close_to_reference(actual, expected, 2e-5)


@pytest.mark.parametrize("preset", [PerceiverARConfig.clm_base, PerceiverARConfig.bytes_small])
def test_published_models_have_as_many_parameters_here_as_there(preset):
    config = preset()
    with torch.device("meta"):
        reference = clm.CausalLanguageModel(reference_config(config))
    ours = jax.eval_shape(lambda: init_params(PerceiverAR(config), jax.random.key(0)))
    numbers = [math.prod(leaf.shape) for leaf in jax.tree.leaves(ours)]
    assert sum(numbers) == sum(parameter.numel() for parameter in reference.parameters())
    # The state dict has the rotary frequencies besides.
    assert len(numbers) + 1 == len(PERCEIVER_IO.of_model(config)) + 1 == len(reference.state_dict())
