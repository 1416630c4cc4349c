import numpy as np
import pytest
from reference import adamw_losses, random_config


@pytest.mark.parametrize("abs_pos_emb", [True, False])
def test_forty_adamw_steps_have_the_losses_of_perceiver_io(abs_pos_emb):
    config = random_config(
        0,
        vocab_size=50,
        max_seq_len=24,
        max_latents=8,
        num_channels=32,
        num_self_attention_layers=2,
        output_norm=True,
        cross_attention_dropout=0.0,
        abs_pos_emb=abs_pos_emb,
    )
    ours, theirs = adamw_losses(config)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    assert ours[-1] < 0.6 * ours[0]
