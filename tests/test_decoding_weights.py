"""Parameters prepared for decoding: float32, bfloat16 and int8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR, generate, load_pretrained
from perceiver_ar_jax.generation import generate_with_log_probs, prefill
from perceiver_ar_jax.model import prepare_for_decoding
from perceiver_ar_jax.model.attention import cached
from perceiver_ar_jax.model.cache import LayerCache
from perceiver_ar_jax.model.decoding_params import DecodingKernel
from perceiver_ar_jax.pretrained import save_pretrained
from perceiver_ar_jax.training import Batch
from perceiver_ar_jax.training.step import token_log_probs

CONFIG = small_config(num_channels=64, num_heads=4)


@functools.cache
def prepared(weights: str):
    """A small model that computes as `load_pretrained` makes it, and its parameters."""
    config = CONFIG.replace(dtype="bfloat16" if weights == "bfloat16" else "float32")
    params = jax.tree.map(jnp.asarray, random_params(CONFIG))
    return PerceiverAR(config), prepare_for_decoding(params, weights)


def rows_of_int8(x):
    """Integers and scales as quantisation is defined, in float64."""
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.round(x / np.where(scale, scale, 1)), scale


@pytest.mark.parametrize("positions", [1, 2, 5, 65])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_a_product_is_that_of_its_definition(weights, positions):
    rng = np.random.default_rng(0)
    rows, x = rng.standard_normal((24, 32)), rng.standard_normal((positions, 32))
    rows[3] = x[0] = 0  # nothing to scale by
    kernel = DecodingKernel.of(jnp.asarray(rows, jnp.float32), weights)
    if weights == "int8":
        (x_int, x_scale), (rows_int, rows_scale) = rows_of_int8(x), rows_of_int8(rows)
        expected = (x_int @ rows_int.T) * x_scale * rows_scale.T
        expected_rows = rows_int * rows_scale
    else:
        as_stored = lambda a: np.asarray(jnp.asarray(a, weights), np.float64)
        expected, expected_rows = as_stored(x) @ as_stored(rows).T, as_stored(rows)
    result = jax.jit(lambda x: kernel(x[:, None]))(jnp.asarray(x, jnp.float32))
    assert result.shape == (positions, 1, 24)
    np.testing.assert_allclose(result[:, 0], expected, atol=2e-5)
    np.testing.assert_allclose(kernel.take(jnp.arange(24)), expected_rows, atol=1e-6)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_tpus_compute_the_same_in_more_rows(weights, monkeypatch):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))
    kernel, x_BD = DecodingKernel.of(draw(24, 16), weights), draw(2, 16)
    caches = [(draw(3, 8), LayerCache(draw(3, 8, 20), draw(3, 8, 20)), jnp.arange(20) < 15)]
    several = LayerCache(draw(2, 3, 8, 20), draw(2, 3, 8, 20))
    caches += [(draw(2, 3, 8), several, draw(2, 20) > 0)]

    def results():
        return [kernel(x_BD), kernel(x_BD[0]), *(cached.attend(*cache) for cache in caches)]

    expected = results()
    taken = []

    def as_on_a_tpu(*arrays, tpu, **others):
        taken.append(tpu)
        return tpu(*arrays)

    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_a_tpu)
    for actual, there in zip(results(), expected, strict=True):
        np.testing.assert_allclose(actual, there, atol=1e-6 * np.abs(there).max())
    assert len(taken) == 4


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.03), ("int8", 0.06)])
def test_logits_stay_close_to_those_of_float32(weights, tolerance):
    tokens_BS = random_tokens(CONFIG, 12)
    logits = {}
    for name in ("float32", weights):
        model, params = prepared(name)
        logits[name] = jax.jit(lambda p, m=model: m.apply({"params": p}, tokens_BS, 6))(params)
    error = np.std(logits[weights] - logits["float32"]) / np.std(logits["float32"])
    assert 0 < error < tolerance


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_cached_decoding_gives_what_full_passes_with_the_same_weights_give(weights):
    model, params = prepared(weights)
    generated = generate_with_log_probs(
        model, params, [[1, 2, 3, 4]], num_latents=2, max_new_tokens=4
    )
    logits = model.apply({"params": params}, generated.tokens[:, :-1], prefix_len=2)
    log_probs = jax.nn.log_softmax(logits)[0, 1:]
    expected = np.take_along_axis(log_probs, generated.tokens[0, 4:, None], axis=1)[:, 0]
    # One step of int8 is 1/127 of the largest input, which rounding may tip either way.
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "int8": 0.1}[weights]
    np.testing.assert_allclose(generated.log_probs[0], expected, atol=tolerance)


def test_float32_gives_the_tokens_of_the_parameters_it_was_made_from():
    params = jax.tree.map(jnp.asarray, random_params(CONFIG))
    model, prepared_params = prepared("float32")
    prompts = [[1, 2, 3], [4, 5]]
    options = {"num_latents": 2, "max_new_tokens": 20}
    np.testing.assert_array_equal(
        generate(model, prepared_params, prompts, **options),
        generate(model, params, prompts, **options),
    )


def test_evaluation_reads_prepared_parameters():
    tokens = random_tokens(CONFIG, 13)
    batch = Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        pad_mask=jnp.zeros((2, 12), bool),
    )
    model, params = prepared("int8")
    log_probs = token_log_probs(params, batch, model=model, prefix_len=6)
    logits = model.apply({"params": params}, batch.tokens, 6)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[:, 6:, None], axis=2)
    np.testing.assert_allclose(log_probs, expected[..., 0], atol=1e-5)


def test_a_prepared_tree_is_prepared_once():
    _, params = prepared("int8")
    assert prepare_for_decoding(params, "int8") is params
    with pytest.raises(ValueError, match="these parameters are int8 already: load them again as"):
        prepare_for_decoding(params, "bfloat16")


def test_a_prompt_read_with_other_weights_is_refused():
    (model, params), (_, others) = prepared("float32"), prepared("int8")
    with pytest.raises(ValueError, match="a model with other parameters has read this prompt"):
        generate(model, others, prefill(model, params, [[1, 2, 3]]))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_loading_with_weights_decides_what_is_computed_in(tmp_path, weights):
    config = small_config(dtype="bfloat16", vocab_size=262)
    save_pretrained(tmp_path, config, random_params(config))
    pretrained = load_pretrained(tmp_path, weights=weights)
    expected = "bfloat16" if weights == "bfloat16" else "float32"
    assert pretrained.config.dtype == pretrained.model.config.dtype == expected
    kernels = [
        leaf.rows_FD.dtype.name
        for leaf in jax.tree.leaves(pretrained.params, is_leaf=lambda x: type(x) is DecodingKernel)
        if isinstance(leaf, DecodingKernel)
    ]
    assert len(kernels) == 1 + 3 * 6 and set(kernels) == {weights}


def test_weights_of_another_kind_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="weights must be one of float32, bfloat16, int8, not 8"):
        load_pretrained("nothing/here", weights=8)
