"""Steps whose loss or gradient norm stands out change only the count of skipped steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perceiver_ar_jax.training import OptimizerConfig, make_optimizer
from perceiver_ar_jax.training.spikes import skip_spikes

PARAMS = {"w": jnp.arange(3.0)}
LOSSES = [1.0, 1.2, 0.9, 1.1]


def after(losses, scales=None, threshold=4.0, window=4):
    """Parameters and optimizer state after steps of these losses and gradient scales."""
    tx = skip_spikes(optax.adam(0.1), window=window, threshold=threshold)
    params, state = PARAMS, tx.init(PARAMS)
    for loss, scale in zip(losses, scales or [1.0] * len(losses), strict=True):
        gradients = {"w": scale * jnp.array([1.0, 2.0, -1.0])}
        updates, state = tx.update(gradients, state, params, value=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(("loss", "scale"), [(9.0, 1.0), (1.0, 9.0)], ids=["loss", "gradient norm"])
def test_a_spike_leaves_parameters_and_moments_untouched(loss, scale):
    scales = [1.0, 1.1, 0.9, 1.0]
    params, state = after(LOSSES, scales)
    spiked_params, spiked = after([*LOSSES, loss], [*scales, scale])
    assert_same(spiked_params, params)
    assert_same(spiked.inner, state.inner)
    assert (int(spiked.skipped), int(spiked.seen)) == (1, 5)


def test_until_the_window_is_full_nothing_is_a_spike():
    _, state = after([1.0, 1.1, 99.0])
    assert int(state.skipped) == 0


def test_without_variation_in_the_window_nothing_is_a_spike():
    """Losses and gradient norms are constant, then the loss rises a little."""
    _, state = after([1.3] * 4 + [1.3 + 1e-6, 1.3 + 2e-6])
    assert int(state.skipped) == 0


def test_a_persistent_new_level_soon_counts_as_normal():
    _, state = after(LOSSES + [5.0] * 20)
    assert 0 < int(state.skipped) < 10


def test_normal_steps_are_those_of_the_inner_optimizer():
    params, state = after(LOSSES)
    tx = optax.adam(0.1)
    expected, inner = PARAMS, tx.init(PARAMS)
    for _ in LOSSES:
        updates, inner = tx.update({"w": jnp.array([1.0, 2.0, -1.0])}, inner, expected)
        expected = optax.apply_updates(expected, updates)
    assert_same((params, state.inner), (expected, inner))


def test_the_settings_choose_it():
    config = OptimizerConfig(skip_spikes=True, spike_window=7)
    assert make_optimizer(config).init(PARAMS).recent_W2.shape == (7, 2)
    with pytest.raises(ValueError, match="spike_window must be at least 2"):
        OptimizerConfig(skip_spikes=True, spike_window=1)
