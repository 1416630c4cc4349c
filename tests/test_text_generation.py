"""Text in, text out: `generate_text`, `stream_text`."""

import jax
import numpy as np
import pytest
from small_models import random_params, small_config

from perceiver_ar_jax import PerceiverAR, Pretrained, generate
from perceiver_ar_jax.generation.prompt import default_num_latents
from perceiver_ar_jax.text_generation import NewText
from perceiver_ar_jax.tokenizers import ByteTokenizer, Tokenizer

CONFIG = small_config(vocab_size=270, max_seq_len=40)
OPTIONS = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 20, "eos_token_id": None}


@pytest.fixture(scope="module")
def pretrained():
    params = random_params(CONFIG)
    return Pretrained(PerceiverAR(CONFIG), params, CONFIG, ByteTokenizer(), step=0)


def test_generate_text_gives_what_follows_each_prompt(pretrained):
    prompts = ["a river", "hé"]
    rows = [pretrained.tokenizer.encode(prompt) for prompt in prompts]
    tokens = generate(
        pretrained.model,
        pretrained.params,
        rows,
        rng=jax.random.key(0),
        num_latents=3,
        vocab_size=262,
        **OPTIONS,
    )[:, -20:]
    texts = pretrained.generate_text(prompts, rng=jax.random.key(0), **OPTIONS)
    assert texts == [pretrained.tokenizer.decode(row) for row in tokens]


def test_the_text_of_a_prompt_does_not_depend_on_the_prompts_around_it(pretrained):
    prompts = ["a", "a river and a house", "b"]
    together = pretrained.generate_text(prompts, max_new_tokens=20)
    assert together == [pretrained.generate_text([x], max_new_tokens=20)[0] for x in prompts]


@pytest.mark.parametrize("seed", range(3))
def test_streamed_pieces_are_one_per_token_and_join_to_the_text(pretrained, seed):
    options = OPTIONS | {"rng": jax.random.key(seed)}
    pieces = list(pretrained.stream_text("a river", **options))
    assert len(pieces) == 20
    assert "".join(pieces) == pretrained.generate_text(["a river"], **options)[0]


def test_text_ends_before_the_id_that_ends_it(pretrained):
    (whole,) = pretrained.continue_texts(["a river"], max_new_tokens=20)
    eos = whole.tokens[7]
    first = whole.tokens.index(eos)
    options = {"max_new_tokens": 20, "eos_token_id": eos}
    (ended,) = pretrained.continue_texts(["a river"], **options)
    assert ended.tokens == whole.tokens[:first]
    np.testing.assert_allclose(ended.log_probs, whole.log_probs[:first])
    assert ended.text == "".join(pretrained.stream_text("a river", **options))


def test_several_texts_for_each_prompt_stand_together(pretrained):
    options = {"do_sample": True, "num_return_sequences": 2, "rng": jax.random.key(0)}
    assert len(set(pretrained.generate_text(["a", "b"], **options))) == 4


class Words(Tokenizer):
    """A tokenizer of words whose decoded text is cleaned up."""

    words = ("it", "is", "n't", "a", ".", "'s", "?")
    cleans_up = True

    def decode_raw(self, ids):
        return " ".join(self.words[i] for i in ids)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 5, 3, 6], [0, 4, 4, 2, 2, 1]], ids=str)
def test_text_that_a_later_token_changes_is_neither_lost_nor_repeated(ids):
    tokenizer = Words()
    for split in range(1, len(ids)):
        text = NewText(tokenizer, ids[:split])
        new = "".join(map(text.push, ids[split:])) + text.flush()
        assert tokenizer.decode(ids[:split]) + new == tokenizer.decode(ids)


def test_the_default_number_of_latents_leaves_room_for_new_tokens():
    large = small_config(max_seq_len=4096, max_latents=512)
    assert [default_num_latents(n, large) for n in (1, 100, 500, 3968, 4096)] == [
        64,
        128,
        384,
        384,
        512,
    ]
    assert [default_num_latents(n, CONFIG) for n in (1, 37, 40)] == [3, 3, 6]


def test_what_cannot_be_continued_is_said_in_one_line(pretrained):
    with pytest.raises(ValueError, match="for a single one pass"):
        pretrained.generate_text("a river")
    with pytest.raises(ValueError, match="the prompt '' is empty"):
        pretrained.generate_text(["a", ""])
    with pytest.raises(ValueError, match="continues one text, not list"):
        pretrained.stream_text(["a"])
    with pytest.raises(ValueError, match="needs num_beams=1"):
        pretrained.stream_text("a", num_beams=2)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        pretrained.stream_text("a", temprature=2)
    without = Pretrained(pretrained.model, pretrained.params, CONFIG, None, step=0)
    with pytest.raises(ValueError, match="without a tokenizer there is no text"):
        without.generate_text(["a"])
    assert pretrained.generate_text([]) == []
