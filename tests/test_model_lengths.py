import jax
import numpy as np
import pytest
from small_models import quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.model import init_params

CONFIG = small_config()  # at most 14 positions, 6 of them latents


def apply(config, length, prefix_len):
    tokens = random_tokens(config, length)
    run = quick_jit(PerceiverAR(config).apply, static_argnums=2)
    return run({"params": random_params(config)}, tokens, prefix_len)


@pytest.mark.parametrize("length, prefix_len", [(1, 0), (6, 0), (9, 8), (14, 8)])
@pytest.mark.parametrize("layers", [0, 2])
def test_prefixes_from_none_to_the_maximum_give_a_row_of_logits_per_latent(
    length, prefix_len, layers
):
    logits = apply(CONFIG.replace(num_self_attention_layers=layers), length, prefix_len)
    assert logits.shape == (2, length - prefix_len, CONFIG.vocab_size)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "length, prefix_len, message",
    [
        (0, 0, "Input sequence length out of valid range [1..14]: it is 0"),
        (15, 8, "Input sequence length out of valid range [1..14]: it is 15"),
        (14, 9, "prefix_len (9) exceeds max_prefix_len (8)"),
        (5, 5, "prefix_len (5) out of valid range [0..5)"),
        (5, -1, "prefix_len (-1) out of valid range [0..5)"),
        (
            10,
            3,
            "10 positions with prefix_len 3 leave 7 latents; the model has at most 6 (max_latents)",
        ),
    ],
)
def test_lengths_out_of_range_are_refused_in_the_words_of_the_reference(
    length, prefix_len, message
):
    with pytest.raises(ValueError) as error:
        apply(CONFIG, length, prefix_len)
    assert str(error.value) == message


def test_init_makes_the_same_parameters_whatever_the_lengths():
    model = PerceiverAR(CONFIG)
    shapes = lambda make: jax.tree.map(lambda x: x.shape, jax.eval_shape(make))
    expected = shapes(lambda: init_params(model, jax.random.key(0)))
    for length, prefix_len in ((1, 0), (14, 8)):
        tokens = random_tokens(CONFIG, length)
        made = shapes(lambda t=tokens, p=prefix_len: model.init(jax.random.key(0), t, prefix_len=p))
        assert made == {"params": expected}
