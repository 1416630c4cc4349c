"""Switches that trade memory and compile time, and must not change results."""

import jax
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR

# Two layers with rotation and two without, so that scan_layers has both kinds of group.
BASE = small_config(num_self_attention_layers=4, num_self_attention_rotary_layers=2)


@pytest.fixture(scope="module")
def params():
    return random_params(BASE)


def loss_and_gradients(config, params):
    tokens, pads = random_tokens(config, 12), left_pads([0, 4], 12)

    def loss(params):
        logits = PerceiverAR(config).apply({"params": params}, tokens, 7, pads)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    return quick_jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def expected(params):
    return loss_and_gradients(BASE, params)


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full"},
        {"remat": "names"},
        {"scan_layers": True},
        {"scan_layers": True, "remat": "full"},
        {"scan_layers": True, "remat": "names"},
        {"max_heads_parallel": 1},
    ],
    ids=str,
)
def test_loss_and_gradients_stay_the_same(changes, params, expected):
    loss, gradients = loss_and_gradients(BASE.replace(**changes), params)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)

    # From a gradient in float64 all of them are as far (measured over 12 draws of the parameters):
    # 4e-7 to 5e-7 in the mean over tensors, up to 6e-6 or 7e-6 in the worst.
    def assert_close(actual, gradient):
        np.testing.assert_allclose(actual, gradient, rtol=0, atol=5e-6 * np.abs(gradient).max())

    jax.tree.map(assert_close, gradients, expected[1])


def saved_bytes(config):
    """Bytes of what the forward pass keeps for the backward pass, the parameters not counted."""
    params = random_params(config)
    tokens = random_tokens(config, config.max_seq_len)

    def loss(params):
        out = PerceiverAR(config).apply({"params": params}, tokens, config.max_prefix_len)
        return out.sum()

    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


def test_remat_keeps_less_for_the_backward_pass():
    config = BASE.replace(max_seq_len=256, max_latents=128)
    none, names, full = (saved_bytes(config.replace(remat=r)) for r in ("none", "names", "full"))
    assert full < 0.5 * names
    assert names < 0.5 * none


def test_heads_in_groups_keep_no_attention_weights_for_the_backward_pass():
    config = BASE.replace(max_seq_len=512, max_latents=64, num_self_attention_layers=0)
    weights = 4 * 2 * config.num_heads * config.max_latents * config.max_seq_len
    saved = saved_bytes(config) - saved_bytes(config.replace(max_heads_parallel=1))
    assert saved >= 0.9 * weights
