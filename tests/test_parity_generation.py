"""Token for token the texts of perceiver-io's `generate(use_cache=True)`.

A case is one call of either, a batch of 4 prompts (greedy) or 2 (searches), with an end of text or
without: 144 greedy cases (46 of them left-padded), 76 of beam search, 48 of contrastive search.
Every one runs past max_latents and past max_seq_len.
"""

import numpy as np
import pytest
from reference_generation import both_models, random_prompts, reference_generate

from perceiver_ar_jax.generation import generate

MODELS, PROMPTS = range(12), range(6)
NEW_TOKENS = 30  # more than max_seq_len of any model


def new(tokens):
    return tokens[:, -NEW_TOKENS:]


@pytest.mark.parametrize("seed", MODELS)
def test_greedy_tokens_are_those_of_perceiver_io(seed):
    reference, model, params = both_models(seed)
    options = {
        "num_latents": min(1 + seed % 4, model.config.max_latents),
        "max_new_tokens": NEW_TOKENS,
        "repetition_penalty": 1.0 if seed % 2 else 1.5,
    }
    for prompt_seed in PROMPTS:
        tokens, pad_mask = random_prompts(model.config, options["num_latents"], prompt_seed)
        expected = reference_generate(reference, tokens, pad_mask, **options)
        actual = generate(model, params, tokens, pad_mask=pad_mask, **options)
        np.testing.assert_array_equal(new(actual), new(expected))
        ending = {"eos_token_id": int(new(expected)[0, NEW_TOKENS // 2]), "pad_token_id": 7}
        expected = reference_generate(reference, tokens, pad_mask, **options, **ending)
        actual = generate(model, params, tokens, pad_mask=pad_mask, **options, **ending)
        np.testing.assert_array_equal(new(actual), new(expected))


BEAMS = [
    {"num_beams": 2},
    {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 2, "repetition_penalty": 1.5, "num_return_sequences": 2},
]


@pytest.mark.parametrize(("seed", "beams"), list(enumerate(BEAMS)), ids=str)
def test_beams_are_those_of_perceiver_io(seed, beams):
    reference, model, params = both_models(seed)
    options = {"num_latents": min(2, model.config.max_latents), "max_new_tokens": NEW_TOKENS}
    for prompt_seed in range(4):
        tokens, pad_mask = random_prompts(
            model.config, options["num_latents"], prompt_seed, batch=2
        )
        greedy = new(generate(model, params, tokens, pad_mask=pad_mask, **options))
        eos_token_ids = [None, int(greedy[0, 8]), int(greedy[1, 3])]
        if seed == 0:
            eos_token_ids.append([int(greedy[0, 8]), int(greedy[1, 3])])
        for eos_token_id in eos_token_ids:
            both = options | beams | {"eos_token_id": eos_token_id}
            expected = reference_generate(reference, tokens, pad_mask, **both)
            actual = generate(model, params, tokens, pad_mask=pad_mask, **both)
            np.testing.assert_array_equal(new(actual), new(expected))


@pytest.mark.parametrize("seed", range(6))
def test_contrastive_search_is_that_of_perceiver_io(seed):
    reference, model, params = both_models(seed)
    options = {
        "num_latents": min(2, model.config.max_latents),
        "max_new_tokens": NEW_TOKENS,
        "penalty_alpha": 0.6,
        "top_k": 3 + seed % 2,
        "repetition_penalty": 1.2 if seed == 3 else 1.0,
    }
    for prompt_seed in range(4):
        tokens, pad_mask = random_prompts(
            model.config, options["num_latents"], prompt_seed, batch=2
        )
        expected = reference_generate(reference, tokens, pad_mask, **options)
        actual = generate(model, params, tokens, pad_mask=pad_mask, **options)
        np.testing.assert_array_equal(new(actual), new(expected))
        ending = {"eos_token_id": int(new(expected)[0, 9])}
        expected = reference_generate(reference, tokens, pad_mask, **options, **ending)
        actual = generate(model, params, tokens, pad_mask=pad_mask, **options, **ending)
        np.testing.assert_array_equal(new(actual), new(expected))
