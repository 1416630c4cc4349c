import numpy as np
import pytest
from reference_generation import both_models, random_prompts, reference_generate

from perceiver_ar_jax.generation import generate

MODELS = range(12)  # 4 prompts of 4 rows each: 192 rows
NEW_TOKENS = 30  # runs past max_latents and max_seq_len of every model


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
    for prompt_seed in range(4):
        tokens, pad_mask = random_prompts(model.config, options["num_latents"], prompt_seed)
        expected = reference_generate(reference, tokens, pad_mask, **options)
        actual = generate(model, params, tokens, pad_mask=pad_mask, **options)
        np.testing.assert_array_equal(new(actual), new(expected))
        ending = {"eos_token_id": int(new(expected)[0, NEW_TOKENS // 2]), "pad_token_id": 7}
        expected = reference_generate(reference, tokens, pad_mask, **options, **ending)
        actual = generate(model, params, tokens, pad_mask=pad_mask, **options, **ending)
        np.testing.assert_array_equal(new(actual), new(expected))
