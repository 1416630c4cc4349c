import numpy as np
import pytest
from reference import adamw_losses


@pytest.mark.parametrize("abs_pos_emb", [True, False])
def test_forty_adamw_steps_have_the_losses_of_perceiver_io(abs_pos_emb):
    ours, theirs = adamw_losses(abs_pos_emb=abs_pos_emb)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    assert ours[-1] < 0.6 * ours[0]
