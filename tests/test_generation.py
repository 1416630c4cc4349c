"""`generate`, `stream` and `prefill`, without the reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig, generate
from perceiver_ar_jax.generation import (
    generate_with_log_probs,
    load_prefilled,
    prefill,
    save_prefilled,
    stream,
)
from perceiver_ar_jax.generation.loop import Decoder, continue_until
from perceiver_ar_jax.generation.sampling import Greedy
from perceiver_ar_jax.generation.texts import Ending
from perceiver_ar_jax.generation.token_by_token import TokenByToken
from perceiver_ar_jax.model import init_params

CONFIG = PerceiverARConfig(
    vocab_size=50,
    max_seq_len=24,
    max_latents=8,
    num_channels=16,
    num_heads=2,
    num_self_attention_layers=2,
)


@pytest.fixture(scope="module")
def model():
    return PerceiverAR(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.4 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@struct.dataclass
class CountingContext:
    """A prompt that a model has read which predicts the number after the last one."""

    tokens_BS: jax.Array
    hidden_BLD: jax.Array

    def seen(self, vocab_size):
        return jnp.zeros((len(self.hidden_BLD), vocab_size), bool)


def count_from(start, new_tokens, ending):
    def one_hot(tokens_B):
        return jax.nn.one_hot(tokens_B + 1, 100)

    decoder = Decoder(step=lambda tokens_B, state: (one_hot(tokens_B), state + 1), head=lambda x: x)
    method = TokenByToken(Greedy())
    prompt_BS = jnp.array(start)[:, None]
    context = CountingContext(prompt_BS, one_hot(prompt_BS))
    progress = method.begin(decoder, context, jnp.int32(0), ending=ending, max_new_tokens=12)
    return continue_until(decoder, method, progress, ending, jnp.int32(new_tokens))


def test_loop_feeds_each_token_back():
    progress = count_from([3, 60], 9, Ending(jnp.array([-1]), jnp.int32(0)))
    expected = [[*range(4, 13), 0, 0, 0], [*range(61, 70), 0, 0, 0]]
    np.testing.assert_array_equal(progress.texts.tokens_RT, expected)
    assert progress.state == 8  # the last token is not read


def test_ended_rows_are_padded_while_others_go_on():
    progress = count_from([3, 60], 9, Ending(jnp.array([6, 99]), jnp.int32(1)))
    expected = [[4, 5, 6, *[1] * 9], [*range(61, 70), 1, 1, 1]]
    np.testing.assert_array_equal(progress.texts.tokens_RT, expected)


def test_loop_stops_when_all_rows_have_ended():
    progress = count_from([3, 60], 9, Ending(jnp.array([6, 63]), jnp.int32(1)))
    assert progress.texts.count == 3


def test_result_is_prompt_and_new_tokens(model, params):
    prompt = np.arange(10).reshape(2, 5)
    tokens = generate(model, params, prompt, max_new_tokens=7)
    assert tokens.shape == (2, 12) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, :5], prompt)


def test_rows_of_different_lengths_give_what_each_gives_alone(model, params):
    rows = [[5, 6, 7], [*range(20)], [9], [*range(30, 42)]]
    options = {"num_latents": 5, "max_new_tokens": 30, "pad_token_id": 49}
    together = generate(model, params, rows, **options)
    assert together.shape == (4, 50)
    for row, tokens in zip(rows, together, strict=True):
        alone = generate(model, params, [row], **options)[0]
        np.testing.assert_array_equal(tokens, [*[49] * (20 - len(row)), *alone])


def test_sampling_is_reproducible_and_differs_between_keys(model, params):
    def sample(seed):
        rng = jax.random.key(seed)
        return generate(model, params, [[1, 2, 3]], do_sample=True, temperature=2.0, rng=rng)

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()


def test_a_sampled_row_does_not_depend_on_the_rows_around_it(model, params):
    options = {"do_sample": True, "temperature": 2.0, "num_latents": 4, "max_new_tokens": 30}
    key = jax.random.key(5)
    rows = [[5, 6, 7], [*range(20)], [9], [*range(30, 42)]]
    together = generate(model, params, rows, rng=key, **options)[:, 20:]
    for i, row in enumerate(rows):
        alone = generate(model, params, [row], rng=jax.random.fold_in(key, i)[None], **options)
        np.testing.assert_array_equal(alone[0, len(row) :], together[i])
    first = generate(model, params, rows[:2], rng=key, **options)[:, 20:]
    np.testing.assert_array_equal(first, together[:2])


def test_each_row_may_have_its_own_key(model, params):
    options = {"do_sample": True, "temperature": 2.0}
    keys = jnp.stack([jax.random.key(7)] * 2 + [jax.random.key(8)])
    same, again, other = generate(model, params, [[1, 2]] * 3, rng=keys, **options)
    np.testing.assert_array_equal(same, again)
    assert (same != other).any()
    raw = jax.random.key_data(keys)
    np.testing.assert_array_equal(
        generate(model, params, [[1, 2]], rng=raw[2:], **options), [other]
    )


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 9e-7])
def test_a_temperature_of_almost_0_is_greedy(model, params, temperature):
    greedy = generate(model, params, [[1, 2, 3]])
    rng = jax.random.key(0)
    options = {"do_sample": True, "temperature": temperature, "rng": rng}
    np.testing.assert_array_equal(generate(model, params, [[1, 2, 3]], **options), greedy)


def test_several_sequences_per_prompt_stand_together_and_differ(model, params):
    tokens = generate(
        model,
        params,
        [[1, 2, 3], [4, 5, 6]],
        do_sample=True,
        temperature=3.0,
        num_return_sequences=3,
        rng=jax.random.key(0),
    )
    np.testing.assert_array_equal(tokens[:, :3], [[1, 2, 3]] * 3 + [[4, 5, 6]] * 3)
    assert len(np.unique(tokens, axis=0)) == 6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "reset"},
        {"do_sample": True, "temperature": 5.0},
        {"do_sample": True, "top_p": 0.9, "top_k": 30},
        {"num_beams": 3, "eos_token_id": [1, 2]},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
    ids=str,
)
def test_ids_that_the_tokenizer_lacks_are_never_chosen(model, params, options):
    options = {"rng": jax.random.key(0), "max_new_tokens": 20, "num_latents": 2} | options
    prompt = [[1, 2, 3], [4, 5]]
    assert generate(model, params, prompt, **options)[:, 3:].max() > 4
    generated = generate_with_log_probs(model, params, prompt, vocab_size=4, **options)
    assert generated.tokens[:, 3:].max() < 4
    assert np.isfinite(generated.log_probs).all()


def test_a_vocabulary_larger_than_the_models_is_refused(model, params):
    with pytest.raises(ValueError, match="vocab_size=51 exceeds the 50 ids of the model"):
        generate(model, params, [[1]], vocab_size=51)


def test_top_k_of_one_is_greedy(model, params):
    greedy = generate(model, params, [[1, 2, 3]])
    sampled = generate(model, params, [[1, 2, 3]], do_sample=True, top_k=1, rng=jax.random.key(0))
    np.testing.assert_array_equal(greedy, sampled)


def test_stream_yields_the_tokens_of_generate(model, params):
    options = {"num_latents": 2, "max_new_tokens": 20}
    expected = generate(model, params, [[1, 2, 3], [4, 5, 6]], **options)
    streamed = stream(model, params, [[1, 2, 3], [4, 5, 6]], **options)
    np.testing.assert_array_equal(np.stack(list(streamed), axis=1), expected[:, 3:])


def test_stream_ends_with_its_rows(model, params):
    expected = generate(model, params, [[1, 2, 3]])[0, 3:]
    streamed = stream(model, params, [[1, 2, 3]], eos_token_id=[int(expected[4])])
    first = list(expected).index(expected[4])
    np.testing.assert_array_equal(np.concatenate(list(streamed)), expected[: first + 1])


def test_closing_a_stream_frees_its_arrays(model, params):
    before = len(jax.live_arrays())
    streamed = stream(model, params, [[1, 2, 3]])
    next(streamed)
    assert len(jax.live_arrays()) > before
    streamed.close()
    assert len(jax.live_arrays()) == before


def test_stream_does_not_wait_for_beams(model, params):
    with pytest.raises(ValueError, match="stream needs num_beams=1"):
        stream(model, params, [[1, 2, 3]], num_beams=2)


def test_contrastive_search_streams(model, params):
    options = {"penalty_alpha": 0.6, "top_k": 3, "max_new_tokens": 9}
    expected = generate(model, params, [[1, 2, 3]], **options)[0, 3:]
    streamed = stream(model, params, [[1, 2, 3]], **options)
    np.testing.assert_array_equal(np.concatenate(list(streamed)), expected)


def test_log_probs_are_those_of_a_full_pass(model, params):
    generated = generate_with_log_probs(
        model, params, [[1, 2, 3, 4]], num_latents=2, max_new_tokens=6, repetition_penalty=1.2
    )
    logits = model.apply({"params": params}, generated.tokens[:, :-1], prefix_len=2)
    log_probs = jax.nn.log_softmax(logits)[0, 1:]
    expected = np.take_along_axis(log_probs, generated.tokens[0, 4:, None], axis=1)[:, 0]
    np.testing.assert_allclose(generated.log_probs[0], expected, atol=1e-5)


def test_log_probs_after_the_end_are_zero(model, params):
    first = generate(model, params, [[1, 2, 3]], max_new_tokens=1)[0, -1]
    generated = generate_with_log_probs(model, params, [[1, 2, 3]], eos_token_id=int(first))
    assert generated.log_probs[0, 0] < 0
    assert (generated.log_probs[0, 1:] == 0).all()


def test_a_prompt_read_once_is_continued_many_times(model, params):
    read = prefill(model, params, [[1, 2, 3], [4, 5]], num_latents=2)
    for options in ({"max_new_tokens": 20}, {"do_sample": True, "rng": jax.random.key(3)}) * 2:
        expected = generate(model, params, [[1, 2, 3], [4, 5]], num_latents=2, **options)
        np.testing.assert_array_equal(generate(model, params, read, **options), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_read_once_survives_a_file_bit_for_bit(params, tmp_path, dtype):
    model = PerceiverAR(CONFIG.replace(dtype=dtype))
    read = prefill(model, params, [[1, 2, 3], [4, 5]], num_latents=2)
    save_prefilled(tmp_path / "prompt", read)
    loaded = load_prefilled(tmp_path / "prompt")
    assert jax.tree.structure(loaded) == jax.tree.structure(read)
    for before, after in zip(jax.tree.leaves(read), jax.tree.leaves(loaded), strict=True):
        assert before.dtype == after.dtype
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    np.testing.assert_array_equal(generate(model, params, loaded), generate(model, params, read))


def test_a_file_that_is_not_a_prefilled_prompt_is_refused(tmp_path):
    (tmp_path / "prompt").write_bytes(b"some text")
    with pytest.raises(ValueError, match="does not hold a prefilled prompt"):
        load_prefilled(tmp_path / "prompt")


def test_a_prompt_read_by_a_model_of_another_shape_is_refused(model, params):
    read = prefill(model, params, [[1, 2, 3]])
    other = PerceiverAR(CONFIG.replace(num_heads=4))
    with pytest.raises(ValueError, match=r"\(2, 2, 8\) layers, heads .* has \(2, 4, 4\)"):
        generate(other, params, read)
    shorter = PerceiverAR(CONFIG.replace(max_seq_len=10))
    with pytest.raises(ValueError, match=r"17 columns, 1 of them latents; .* at most 10 and 8"):
        generate(shorter, params, read)


def test_a_prompt_read_with_other_parameters_is_refused(model, params):
    read = prefill(model, params, [[1, 2, 3]])
    with pytest.raises(ValueError, match="other parameters has read this prompt: prefill it"):
        generate(model, jax.tree.map(lambda x: x * 1.001, params), read)


def test_prompts_of_any_length_compile_few_programs():
    config = CONFIG.replace(max_seq_len=1024, max_latents=128, num_channels=4, num_heads=1)
    model = PerceiverAR(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    compiled = []

    def count(name, _, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    for length, new_tokens in zip(range(1, 513, 7), itertools.cycle([1, 16, 40, 64])):
        generate(model, params, [[1] * length], num_latents=4, max_new_tokens=new_tokens)
    jax.monitoring.unregister_event_duration_listener(count)
    buckets = 4  # prefixes of up to 64, 128, 256 and 512 positions
    assert len(compiled) <= 1 + 3 * buckets, "transposed embedding; prefill, first token, loop"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, r"sequence length out of valid range \[1..24\]: the prompt is empty"),
        ([[1] * 25], {}, r"out of valid range \[1..24\]: the prompt has 25 tokens; .* last 24"),
        ([[1]], {"num_latents": 0}, r"num_latents=0 out of valid range \[1..8\]"),
        ([[1]], {"num_latents": 9}, r"num_latents=9 out of valid range \[1..8\]"),
        (
            [[1] * 20],
            {"num_latents": 3},
            r"For given sequence of length=20, num_latents must be in range \[4..8\]",
        ),
        ([[1, 2], []], {}, "row 1 of the prompt is empty"),
        ([[1, 2, 3], [4, 50]], {}, "token id 50 in row 1, column 2 of the prompt"),
        ([[1, -1]], {}, "token id -1 in row 0, column 1 of the prompt"),
        ([[1.5, 2.0]], {}, "token ids are whole numbers, not float64"),
        ([1, 2], {}, r"a prompt is rows of token ids.*; for a single prompt pass \[ids\]"),
        ("some text", {}, "rows of token ids, not text: .* generate_text"),
        (["some", "text"], {}, "rows of token ids, not text: .* generate_text"),
        ([[1]], {"num_latents": 1.5}, "num_latents must be a whole number, not 1.5"),
        (np.zeros(3, int), {}, "a prompt is rows of token ids"),
        (np.zeros((1, 3), int), {"pad_mask": np.zeros((1, 2), bool)}, "pad_mask is of shape"),
        (
            np.zeros((1, 3), int),
            {"pad_mask": np.array([[False, True, False]])},
            "row 0 of the prompt has pads that are not on the left: pad_mask is True at pads",
        ),
        (
            np.zeros((2, 3), int),
            {"pad_mask": np.ones((2, 3), int)},
            "every row of the prompt is all pads: pad_mask is True at pads, where .* is 0",
        ),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens must be a whole number, not 2.0"),
        ([[1]], {"num_beams": "2"}, "num_beams must be a whole number, not '2'"),
        ([[1]], {"pad_token_id": None, "top_k": 1.5}, "top_k must be a whole number, not 1.5"),
        ([[1]], {"temperature": "0.5"}, "temperature must be a number, not '0.5'"),
        ([[1]], {"temperature": -1.0}, "temperature must not be negative, but is -1.0"),
        ([[1]], {"temperature": 0.5}, "temperature=0.5 changes nothing without do_sample=True"),
        ([[1]], {"top_k": 5, "top_p": 0.5}, "top_k=5, top_p=0.5 changes nothing without do_sam"),
        ([[1]], {"eos_token_id": []}, r"eos_token_id must be a token id or several.*, not \[\]"),
        ([[1]], {"eos_token_id": "x"}, "eos_token_id must be a token id or several.*, not 'x'"),
        ([[1]], {"do_sample": True, "rng": 0}, r"rng must be a key such as .*key\(0\), not 0"),
        (
            [[1]],
            {"do_sample": True, "rng": jax.random.split(jax.random.key(0))},
            r"rng is one key or one per row of the result \(1\), not of shape \(2,\)",
        ),
        ([[1]], {"top_p": 1.5}, "top_p must be between 0 and 1, not 1.5"),
        ([[1]], {"policy": "glide"}, "policy must be one of slide.*, not 'glide'"),
        ([[1]], {"do_sample": True}, "do_sample=True needs rng"),
        ([[1]], {"num_return_sequences": 2}, "need do_sample=True or beam search"),
        ([[1]], {"num_beams": 2, "num_return_sequences": 3}, "=3 exceeds num_beams=2"),
        ([[1]], {"num_beams": 2, "do_sample": True}, "beam search does not sample"),
        ([[1]], {"early_stopping": "soon"}, "early_stopping must be True, False or 'never'"),
        ([[1]], {"early_stopping": 2}, "early_stopping must be True, False or 'never', not 2"),
        ([[1]], {"penalty_alpha": 0.5}, "penalty_alpha needs top_k"),
        ([[1]], {"penalty_alpha": 0.5, "top_k": 51}, "top_k=51 candidates: .* only 50 token ids"),
        ([[1]], {"num_beams": 2, "vocab_size": 1, "eos_token_id": 0}, "1 of 1 ids end a row"),
        ([[1]], {"penalty_alpha": 0.5, "top_k": 4, "num_beams": 2}, "neither do_sample nor num_b"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(model, params, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompt, **options)


def test_swapped_or_wrong_models_and_parameters_are_said_in_one_line(model, params):
    with pytest.raises(ValueError, match="model and params are swapped"):
        generate(params, model, [[1]])
    with pytest.raises(ValueError, match=r"model must be a PerceiverAR, not dict"):
        generate(params, params, [[1]])
    with pytest.raises(ValueError, match=r"params must be the parameters of .* these have params"):
        generate(model, {"params": params}, [[1]])


def test_numbers_of_numpy_and_jax_are_accepted(model, params):
    expected = generate(model, params, [[1, 2, 3], [4]], num_latents=2, max_new_tokens=5)
    actual = generate(
        model,
        params,
        [[jnp.int32(1), 2, 3], np.array([4])],
        num_latents=np.int64(2),
        max_new_tokens=np.int32(5),
        temperature=jnp.float32(1),
        eos_token_id=np.array([-1]),
    )
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("early_stopping", [1, np.True_])
def test_early_stopping_of_1_is_true(model, params, early_stopping):
    """Also for the calls after it, which share its compiled program."""
    options = {"num_beams": 3, "eos_token_id": [*range(0, 50, 3)], "length_penalty": 9.0}
    prompt = [[1, 2, 3]]
    texts = {
        value: generate(model, params, prompt, early_stopping=value, **options)
        for value in (early_stopping, True, False)
    }
    np.testing.assert_array_equal(texts[early_stopping], texts[True])
    assert (texts[True] != texts[False]).any()


def test_unknown_arguments_are_refused_by_name(model, params):
    with pytest.raises(TypeError, match="no argument 'typical_p'"):
        generate(model, params, [[1]], typical_p=0.2)
    with pytest.raises(TypeError, match="did you mean 'max_new_tokens'"):
        generate(model, params, [[1]], max_new_token=3)
