import numpy as np
import pytest
from reference_generation import both_models, random_prompts, reference_generate

from perceiver_ar_jax.generation import generate

MODELS = range(12)
NEW_TOKENS = 30  # runs past max_latents and max_seq_len of every model


@pytest.mark.parametrize("seed", MODELS)
def test_greedy_tokens_are_those_of_perceiver_io(seed):
    reference, model, params = both_models(seed)
    for prompt_seed in range(4):
        tokens, pad_mask, num_latents = random_prompts(model.config, prompt_seed)
        options = {"num_latents": num_latents, "max_new_tokens": NEW_TOKENS}
        expected = reference_generate(reference, tokens, pad_mask, **options)
        actual = generate(model, params, tokens, pad_mask=pad_mask, **options)
        np.testing.assert_array_equal(actual, expected)
