import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR

CONFIGS = {
    "absolute positions": small_config(),
    "rotary positions alone": small_config(abs_pos_emb=False, num_self_attention_rotary_layers=-1),
}


def logits(config, tokens_BS, prefix_len, pad_mask_BS=None):
    apply = quick_jit(PerceiverAR(config).apply, static_argnums=2)
    return np.asarray(apply({"params": random_params(config)}, tokens_BS, prefix_len, pad_mask_BS))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "real, latents",
    [
        pytest.param(9, 5, id="pads in the prefix"),
        pytest.param(5, 5, id="pads fill the prefix"),
        pytest.param(3, 3, id="pads among the latents"),
        pytest.param(1, 1, id="one real token"),
    ],
)
def test_left_padded_rows_give_what_the_unpadded_rows_give(name, real, latents):
    config = CONFIGS[name]
    tokens_1S = random_tokens(config, 12, batch=1)
    unpadded = logits(config, tokens_1S[:, -real:], real - latents)
    beside_a_full_row = np.concatenate([random_tokens(config, 12, batch=1, seed=1), tokens_1S])
    padded = logits(config, beside_a_full_row, 7, left_pads([0, 12 - real], 12))
    np.testing.assert_allclose(padded[1:, -latents:], unpadded, rtol=0, atol=3e-6)


def test_what_stands_at_the_pads_does_not_matter():
    config = CONFIGS["absolute positions"]
    tokens_BS = random_tokens(config, 12)
    pads = left_pads([3, 9], 12)
    others_BS = np.where(pads, (tokens_BS + 1) % config.vocab_size, tokens_BS)
    first, second = (logits(config, t, 7, pads) for t in (tokens_BS, others_BS))
    real_BL = ~pads[:, 7:]
    np.testing.assert_array_equal(first[real_BL], second[real_BL])


def test_rows_of_pads_alone_are_finite():
    config = CONFIGS["absolute positions"]
    tokens_BS = random_tokens(config, 12)
    assert np.isfinite(logits(config, tokens_BS, 7, left_pads([12, 0], 12))).all()


def test_a_pad_mask_without_pads_changes_nothing():
    config = CONFIGS["absolute positions"]
    tokens_BS = random_tokens(config, 12)
    without = logits(config, tokens_BS, 7)
    np.testing.assert_array_equal(logits(config, tokens_BS, 7, left_pads([0, 0], 12)), without)
