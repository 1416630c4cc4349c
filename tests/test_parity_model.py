import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    assert_close_to_reference,
    our_model,
    random_config,
    random_input,
    reference_model,
    torch,
)


@pytest.mark.parametrize("seed", range(60))
def test_logits_are_those_of_perceiver_io(seed):
    config = random_config(seed)
    reference = reference_model(config, seed)
    model, params = our_model(reference, config)
    apply = jax.jit(model.apply, static_argnames="prefix_len")
    for input_seed in range(3):
        tokens, prefix_len, pads = random_input(config, input_seed)
        with torch.no_grad():
            expected = reference(
                torch.tensor(tokens), prefix_len=prefix_len, pad_mask=torch.tensor(pads)
            ).logits
        actual = apply({"params": params}, tokens, prefix_len=prefix_len, pad_mask=pads)
        assert_close_to_reference(actual, expected, 2e-5)
