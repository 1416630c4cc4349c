"""Keys and values of decoding as int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR, generate, load_pretrained
from perceiver_ar_jax.generation import (
    generate_with_log_probs,
    load_prefilled,
    prefill,
    save_prefilled,
)
from perceiver_ar_jax.model.attention import cached
from perceiver_ar_jax.model.cache import KeysValues, LayerCache
from perceiver_ar_jax.pretrained import save_pretrained

CONFIG = small_config(num_channels=32)
PARAMS = jax.tree.map(jnp.asarray, random_params(CONFIG))
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 5, 6, 7]]


def model(**changes):
    return PerceiverAR(CONFIG.replace(**changes))


def as_stored(x_BKNH):
    """What int8 keeps of keys or values, as its definition says, in float64."""
    x_BKNH = np.asarray(x_BKNH, np.float64)
    scale = np.abs(x_BKNH).max(axis=-1, keepdims=True) / 127
    return np.round(x_BKNH / np.where(scale, scale, 1)) * scale


def expected_attention(q_BTNH, k_BKNH, v_BKNH, mask_BTK):
    scores = np.einsum("BTNH,BKNH->BNTK", q_BTNH, k_BKNH)
    weights = np.where(mask_BTK[:, None], np.exp(scores), 0)
    return np.einsum("BNTK,BKNH->BTNH", weights / weights.sum(-1, keepdims=True), v_BKNH)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "default"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (1, 2), (3, 4)])
def test_attention_is_that_to_the_integers_that_are_stored(platform, batch, tokens, monkeypatch):
    monkeypatch.setattr(cached, "CHUNK", 8)  # so that the last of three chunks overlaps
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *x, **of: of.get(platform, of["default"])(*x)
    )
    rng = np.random.default_rng(0)
    q_BTNH = np.float32(rng.standard_normal((batch, tokens, 2, 16)))
    k_BKNH, v_BKNH = np.float32(rng.standard_normal((2, batch, 21, 2, 16)))
    v_BKNH[:, 4] = 0  # nothing to scale by
    mask_BTK = rng.random((batch, tokens, 21)) < 0.6
    mask_BTK[:, :, :9] = False  # nothing of the first chunk is seen
    cache = LayerCache.of(KeysValues(jnp.asarray(k_BKNH), jnp.asarray(v_BKNH)), "int8")
    actual = cache.attend(jnp.asarray(q_BTNH), jnp.asarray(mask_BTK))
    expected = expected_attention(q_BTNH, as_stored(k_BKNH), as_stored(v_BKNH), mask_BTK)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_slots_are_written_read_and_taken_with_their_scales():
    rng = np.random.default_rng(0)
    k_BKNH, v_BKNH = kv = KeysValues(*jnp.float32(rng.standard_normal((2, 3, 5, 2, 16))))
    cache = LayerCache.of(KeysValues(k_BKNH[:, :3], v_BKNH[:, :3]), "int8").padded_to(7)
    cache = cache.write(KeysValues(k_BKNH[:, 3:], v_BKNH[:, 3:]), 4).take(jnp.array([2, 0]))
    for start, size, source in ((0, 3, slice(0, 3)), (4, 2, slice(3, 5))):
        read = cache.read(start, size, batch=2, dtype=jnp.float32)
        for x, stored in zip(kv, read, strict=True):
            np.testing.assert_allclose(stored, as_stored(x)[[2, 0], source], atol=1e-6)
    assert cache.capacity == 7


def test_decoding_stays_close_to_that_with_exact_caches():
    tokens_BS, pads_BS = random_tokens(CONFIG, 12), left_pads([0, 2], 12)
    hidden = {}
    for dtype in (None, "int8"):
        reader = model(cache_dtype=dtype, prefix_chunk=3)

        @quick_jit
        def read(params, reader=reader):
            variables = {"params": params}
            _, cache = reader.apply(variables, tokens_BS, 6, pads_BS, method="prefill")
            cache = cache.with_room(columns=12, latents=6)
            for token_B in tokens_BS.T[:3]:
                hidden_BD, cache = reader.apply(variables, token_B, cache, method="decode_step")
            return hidden_BD, cache

        hidden[dtype], cache = read(PARAMS)
        kinds = {x.dtype.name for x in (cache.cross.k, cache.cross.v, cache.layers[0].k)}
        assert kinds == {dtype or "float32"}
    error = np.std(hidden["int8"] - hidden[None]) / np.std(hidden[None])
    assert 1e-5 < error < 0.02


def test_prompt_lookup_gives_the_tokens_of_greedy_decoding():
    options = {"num_latents": 2, "max_new_tokens": 16}
    reader = model(cache_dtype="int8")
    expected = generate_with_log_probs(reader, PARAMS, PROMPTS, **options)
    actual = generate_with_log_probs(reader, PARAMS, PROMPTS, prompt_lookup_num_tokens=3, **options)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=1e-4)


def test_a_prompt_in_a_file_is_continued_as_it_would_have_been(tmp_path):
    reader = model(cache_dtype="int8")
    read = prefill(reader, PARAMS, PROMPTS, num_latents=2)
    save_prefilled(tmp_path / "prompt", read)
    loaded = load_prefilled(tmp_path / "prompt")
    jax.tree.map(np.testing.assert_array_equal, loaded, read)
    expected = generate(reader, PARAMS, PROMPTS, num_latents=2, max_new_tokens=6)
    np.testing.assert_array_equal(generate(reader, PARAMS, loaded, max_new_tokens=6), expected)


def test_loading_decides_what_caches_are_in(tmp_path):
    save_pretrained(tmp_path, CONFIG, PARAMS)
    pretrained = load_pretrained(tmp_path, weights="int8", cache_dtype="int8")
    assert pretrained.model.config.cache_dtype == pretrained.config.cache_dtype == "int8"
    with pytest.raises(ValueError, match="cache_dtype must be int8, not 'int4'"):
        load_pretrained("nothing/here", cache_dtype="int4")
