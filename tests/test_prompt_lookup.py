"""Prompt lookup: the same texts in fewer passes."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from small_models import random_params, small_config

from perceiver_ar_jax import PerceiverAR, generate
from perceiver_ar_jax.generation import generate_with_log_probs, stream
from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder, continue_until
from perceiver_ar_jax.generation.prompt_lookup import PromptLookup, look_up
from perceiver_ar_jax.generation.sampling import Greedy
from perceiver_ar_jax.generation.texts import Ending
from perceiver_ar_jax.generation.token_by_token import TokenByToken
from perceiver_ar_jax.model import Cache
from perceiver_ar_jax.model.cache import LayerCache

CONFIG = small_config(vocab_size=8, max_seq_len=40, max_latents=20)
PROMPTS = [[1, 2, 3, 1, 2, 3, 1], [4, 5]]


@functools.cache
def small_model():
    return PerceiverAR(CONFIG), jax.tree.map(jnp.asarray, random_params(CONFIG, seed=2))


@pytest.mark.parametrize(
    ("text", "pads", "matched", "expected"),
    [
        ([5, 6, 7, 1, 2, 9, 5, 6, 7], 0, 3, [1, 2, 9, 5]),
        ([5, 6, 7, 1, 5, 6, 7, 2, 5, 6, 7], 0, 3, [2, 5, 6, 7]),  # the newest occurrence
        ([5, 6, 7, 1, 9, 6, 7, 2, 5, 6, 7], 0, 3, [1, 9, 6, 7]),  # but rather the longest
        ([4, 8, 3, 8, 3, 8], 0, 3, [3, 8, 3, 8]),  # beyond the end of the text
        ([9, 9, 9, 9], 0, 3, [9, 9, 9, 9]),
        ([*range(10, 22), 5, *range(10, 22)], 0, 8, [5, 10, 11, 12]),
        ([0, 0, 1, 0, 0, 1], 1, 2, [0, 0, 1, 0]),  # pads match nothing
        ([0, 0, 1, 0, 0, 1], 0, 3, [0, 0, 1, 0]),
        ([1, 2], 0, 0, None),
    ],
)
def test_a_guess_is_what_followed_the_last_tokens(text, pads, matched, expected):
    room = [text + [7] * 5]
    guess, found = look_up(jnp.array(room), jnp.int32(len(text)), jnp.array([pads]), num_tokens=4)
    assert found.tolist() == [matched]
    if expected:
        assert guess.tolist() == [expected]


@struct.dataclass
class Given:
    """Takes the tokens of a text, whatever the logits are."""

    text_T: jax.Array

    def __call__(self, logits_BV, count):
        return self.text_T[count][None]


class Passes(NamedTuple):
    """How often the model was asked for a token, and for several."""

    single: int
    several: int


def passes_and_tokens(next_token, start, count, choose=None):
    """The passes for `count` tokens, each a function of the one before or chosen so."""
    table = jax.nn.one_hot(jnp.asarray(next_token), len(next_token))
    decoder = Decoder(
        step=lambda tokens_R, passes: (table[tokens_R], passes._replace(single=passes.single + 1)),
        head=lambda hidden: hidden,
        read_ahead=lambda tokens_RT, passes: (
            table[tokens_RT],
            jnp.int32(5),
            passes._replace(several=passes.several + 1),
        ),
        keep=lambda tokens_RT, count, passes: passes,
    )
    pads_B = jnp.zeros(len(start), jnp.int32)
    cache = Cache(LayerCache(None, None), (), pads_B, jnp.int32(0), jnp.int32(1))
    prompt_BS = jnp.array(start)[:, None]
    context = Context(prompt_BS, table[prompt_BS], cache)
    ending = Ending(jnp.array([-1]), jnp.int32(0))
    method = PromptLookup(TokenByToken(choose or Greedy()), tokens_ahead=4)
    none = Passes(jnp.int32(0), jnp.int32(0))
    progress = method.begin(decoder, context, none, ending=ending, max_new_tokens=64)
    progress = continue_until(decoder, method, progress, ending, jnp.int32(count))
    return Passes(*map(int, progress.state)), progress.texts.tokens_RT[:, :count].tolist()


def test_a_text_that_repeats_itself_takes_few_passes():
    passes, (text,) = passes_and_tokens([1, 2, 3, 4, 5, 0], [0], count=50)
    assert text == [(1 + i) % 6 for i in range(50)]
    assert passes == (5, 9)  # until a token has occurred before, then five tokens at a time


def test_rows_guess_once_all_of_them_have_been_right():
    passes, texts = passes_and_tokens([1, 2, 0, 4, 5, 6, 7, 3], [0, 3], count=50)
    assert texts[0] == [(1 + i) % 3 for i in range(50)]
    assert texts[1] == [3 + (1 + i) % 5 for i in range(50)]
    assert 4 < passes.single < 20 and passes.several == math.ceil((49 - passes.single) / 5)


def test_a_text_that_never_repeats_itself_takes_a_pass_per_token():
    passes, (text,) = passes_and_tokens([*range(1, 60), 59], [0], count=50)
    assert text == [*range(1, 51)]
    assert passes == (49, 0)  # the first token comes with the prompt


def test_matches_that_mislead_are_not_followed_until_they_are_right():
    misleading = [token for new in range(1, 17) for token in (0, new)]  # what follows 0 is new
    text = jnp.array([*misleading, *[20, 21, 22] * 11])
    passes, _ = passes_and_tokens([0] * 32, [31], count=32, choose=Given(text))
    assert passes == (30, 1)
    passes, (tokens,) = passes_and_tokens([0] * 32, [31], count=64, choose=Given(text))
    assert tokens == text[:64].tolist()
    assert passes.several > 4 and passes.single + passes.several < 48


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"eos_token_id": [0, 3]},
        {"do_sample": True, "temperature": 0.4, "top_k": 3, "rng": jax.random.key(1)},
    ],
    ids=["greedy", "penalty", "end", "sampled"],
)
def test_tokens_and_log_probs_are_those_without_lookup(options):
    model, params = small_model()
    options = {"num_latents": 2, "max_new_tokens": 60, "pad_token_id": 7} | options
    plain = generate_with_log_probs(model, params, PROMPTS, **options)
    ahead = generate_with_log_probs(model, params, PROMPTS, **options, prompt_lookup_num_tokens=4)
    np.testing.assert_array_equal(ahead.tokens, plain.tokens)
    np.testing.assert_allclose(ahead.log_probs, plain.log_probs, atol=1e-4)
    streamed = stream(model, params, PROMPTS, **options, prompt_lookup_num_tokens=4)
    new_tokens = np.stack(list(streamed), axis=1)
    np.testing.assert_array_equal(new_tokens, plain.tokens[:, 7 : 7 + new_tokens.shape[1]])


class OneAtATime:
    """A policy that cannot read ahead."""

    def start(self, context, max_new_tokens, config):
        raise NotImplementedError

    def step(self, model, params, tokens_B, state):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "goes with greedy choice and sampling, not with num_beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "goes with greedy choice and sampling, not with"),
        ({"policy": OneAtATime()}, "needs a policy with read_ahead and keep, such as slide"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens must be at least 1, not 0"),
        ({"prompt_lookup_num_tokens": "4"}, "must be a whole number, not '4'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, words):
    model, params = small_model()
    with pytest.raises(ValueError, match=words):
        generate(model, params, [[1]], **{"prompt_lookup_num_tokens": 4} | options)
