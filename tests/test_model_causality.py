"""Causality, proved by zero gradients: which token moves which latent."""

import jax
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, small_config

from perceiver_ar_jax import PerceiverAR

CONFIGS = {
    "plain": small_config(),
    "rotary positions alone, in all layers": small_config(
        abs_pos_emb=False, num_self_attention_rotary_layers=-1
    ),
    "no self-attention layers": small_config(num_self_attention_layers=0),
    "heads in groups": small_config(max_heads_parallel=1),
    "remat and scanned layers": small_config(
        num_self_attention_layers=3, remat="names", scan_layers=True
    ),
}


def influence(config, prefix_len, pad_mask_BS, **apply):
    """Whether each token of each row moves each latent of each row, (B, L, B, S)."""
    batch, length = pad_mask_BS.shape
    tokens_BS = np.arange(batch * length).reshape(batch, length)  # no two alike
    params = random_params(config.replace(vocab_size=tokens_BS.size))
    model = PerceiverAR(config.replace(vocab_size=tokens_BS.size))
    direction_D = np.random.default_rng(1).standard_normal(config.num_channels)

    def read(table_VD):
        variables = {"params": params | {"token_embedding": {"embedding": table_VD}}}
        # `hidden`, because the head reads the table too.
        hidden_BLD = model.apply(
            variables, tokens_BS, prefix_len, pad_mask_BS, method="hidden", **apply
        )
        return hidden_BLD @ direction_D

    jacobian_BLVD = quick_jit(jax.jacrev(read))(params["token_embedding"]["embedding"])
    moves_BLV = (np.asarray(jacobian_BLVD) != 0).any(-1)
    return moves_BLV.reshape(batch, -1, batch, length)


def visible(prefix_len, pad_mask_BS):
    """What each latent should read: its own row's real tokens, up to itself, (B, L, B, S)."""
    batch, length = pad_mask_BS.shape
    past_LS = np.arange(length) <= np.arange(prefix_len, length)[:, None]
    own_row = np.eye(batch, dtype=bool)[:, None, :, None]
    return own_row & (past_LS & ~pad_mask_BS[:, None])[:, :, None]


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_read_all_real_tokens_of_their_row_up_to_themselves_and_no_others(name):
    prefix_len, pads = 6, left_pads([0, 4, 8], length=11)  # the last row has pads among latents
    moves, expected = influence(CONFIGS[name], prefix_len, pads), visible(prefix_len, pads)
    real_BL = ~pads[:, prefix_len:]
    assert real_BL.sum() == 13
    np.testing.assert_array_equal(moves[real_BL], expected[real_BL])


@pytest.mark.parametrize("prefix_len, length", [(0, 1), (0, 6), (8, 9), (8, 14)])
def test_so_it_is_at_the_ends_of_the_range_of_lengths(prefix_len, length):
    pads = left_pads([0], length)
    moves = influence(CONFIGS["plain"], prefix_len, pads)
    np.testing.assert_array_equal(moves, visible(prefix_len, pads))


def test_in_training_each_row_loses_its_own_exact_share_of_the_prefix_and_no_latent():
    config = small_config(cross_attention_dropout=0.4)
    prefix_len, pads = 8, left_pads([0, 0, 0, 0], length=13)
    moves = influence(
        config, prefix_len, pads, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    kept_BP = np.stack([moves[row, -1, row, :prefix_len] for row in range(4)])
    assert kept_BP.sum(1).tolist() == [8 - int(8 * 0.4)] * 4
    assert len(np.unique(kept_BP, axis=0)) > 1
    expected = visible(prefix_len, pads)
    expected[..., :prefix_len] &= kept_BP[:, None, None]
    np.testing.assert_array_equal(moves, expected)
