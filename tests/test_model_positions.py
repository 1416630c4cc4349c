import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.model.positions import (
    inverse_frequencies,
    positions,
    rotate,
    rotation,
)

FAR = 2**20
CONFIGS = {
    "clm_base": PerceiverARConfig.clm_base(),
    "bytes_small": PerceiverARConfig.bytes_small(),
    "stored in bf16": PerceiverARConfig.clm_base(
        rotary_inv_freq=np.asarray(
            jnp.asarray(inverse_frequencies(PerceiverARConfig.clm_base()), jnp.bfloat16), float
        )
    ),
}


def angle_error(cos, sin, config, positions_S):
    """Largest distance on the circle from position × frequency in float64, in radians."""
    exact = positions_S[:, None].astype(np.float64) * inverse_frequencies(config).astype(np.float64)
    difference = np.arctan2(np.asarray(sin, np.float64), np.asarray(cos, np.float64)) - exact
    return np.abs((difference + np.pi) % (2 * np.pi) - np.pi).max()


def sample_of_positions(last):
    rng = np.random.default_rng(0)
    return np.concatenate([np.arange(64), rng.integers(0, last, 4000), [last - 1, last]])


@pytest.mark.parametrize("name", CONFIGS)
def test_angles_are_exact_up_to_a_million_positions(name):
    positions_S = sample_of_positions(FAR)
    cos, sin = quick_jit(rotation, static_argnums=1)(positions_S[None], CONFIGS[name])
    assert angle_error(cos[0], sin[0], CONFIGS[name], positions_S) < 1e-6


def test_a_plain_float32_product_is_not_exact_there():
    config = CONFIGS["clm_base"]
    positions_S = sample_of_positions(FAR)
    angles = jnp.asarray(positions_S, jnp.float32)[:, None] * inverse_frequencies(config)
    assert angle_error(jnp.cos(angles), jnp.sin(angles), config, positions_S) > 1e-2


def test_angles_are_exact_up_to_the_last_int32_position():
    positions_S = sample_of_positions(2**31 - 1)
    config = CONFIGS["clm_base"]
    cos, sin = rotation(jnp.asarray(positions_S, jnp.int32)[None], config)
    assert angle_error(cos[0], sin[0], config, positions_S) < 2e-6  # half of it from float64


def test_frequencies_fall_from_1_by_equal_factors():
    base = inverse_frequencies(small_config(num_channels=32, abs_pos_emb=False))
    np.testing.assert_allclose(base, 10000.0 ** -(np.arange(8) / 8), rtol=1e-6)
    half = inverse_frequencies(small_config(num_channels=32, abs_pos_emb=True))
    np.testing.assert_allclose(half, 10000.0 ** -(np.arange(4) / 4), rtol=1e-6)


def test_positions_count_from_the_first_real_token():
    assert positions(4).tolist() == [[0, 1, 2, 3]]
    pads = np.array([[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    assert positions(4, pads).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
    config = small_config()
    angles = quick_jit(rotation, static_argnums=1)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, config.head_dim))

    def product(position_q, position_k):
        at = lambda x, position: rotate(x, angles(jnp.int32([[position]]), config))
        return float((at(q, position_q) * at(k, position_k)).sum())

    near, far = product(7, 3), product(FAR + 7, FAR + 3)
    assert math.isclose(near, far, abs_tol=1e-5)
    assert not math.isclose(near, product(8, 3), abs_tol=1e-3)


@pytest.mark.parametrize("abs_pos_emb, rotated", [(True, 4), (False, 8)])
def test_channels_behind_the_rotated_ones_pass(abs_pos_emb, rotated):
    config = small_config(abs_pos_emb=abs_pos_emb)
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, config.head_dim))
    turned = rotate(x, rotation(jnp.int32([[1, 5, 9]]), config))
    changed = np.asarray(turned != x).any(axis=(0, 1, 2))
    assert changed.tolist() == [True] * rotated + [False] * (config.head_dim - rotated)


def test_stored_frequencies_change_the_logits_but_are_no_parameters():
    config = small_config()
    formula = inverse_frequencies(config)
    stored = config.replace(rotary_inv_freq=tuple(formula * 1.01))
    params = random_params(config)
    tokens = random_tokens(config, 12)

    def logits(config):
        return quick_jit(lambda: PerceiverAR(config).apply({"params": params}, tokens, 7))()

    same = config.replace(rotary_inv_freq=tuple(formula))
    np.testing.assert_array_equal(logits(same), logits(config))
    assert np.abs(logits(stored) - logits(config)).max() > 1e-4
    shapes = [
        jax.eval_shape(lambda c=c: init_params(PerceiverAR(c), jax.random.key(0)))
        for c in (config, stored)
    ]
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, *shapes))
