import math

import jax
import numpy as np
import pytest
from small_models import quick_jit, small_config

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.model import init_params


def shapes(config):
    return jax.eval_shape(lambda: init_params(PerceiverAR(config), jax.random.key(0)))


def count(config):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config)))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_published_models_have_their_published_numbers_of_parameters(scan_layers):
    # Rotary frequencies are no parameters: neither here nor in the reference's counts.
    assert count(PerceiverARConfig.clm_base(scan_layers=scan_layers)) == 453_950_720
    assert count(PerceiverARConfig.bytes_small(scan_layers=scan_layers)) == 30_563_078


def test_only_the_output_projection_of_the_cross_attention_the_norms_and_the_head_have_biases():
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(shapes(small_config(output_bias=True)))
    ]
    biases = {path for path in paths if path.endswith("bias") and "norm" not in path}
    assert biases == {"cross_attention/attention/o_proj/bias", "output_bias"}


@pytest.mark.parametrize(
    "field, name",
    [
        ("abs_pos_emb", "position_embedding"),
        ("output_norm", "out_norm"),
        ("output_bias", "output_bias"),
    ],
)
def test_an_option_switched_off_has_no_parameters(field, name):
    assert name in shapes(small_config(**{field: True}))
    assert name not in shapes(small_config(**{field: False}))


def test_widening_factors_are_those_of_each_kind_of_layer():
    made = shapes(small_config(cross_attention_widening_factor=3, self_attention_widening_factor=5))
    assert made["cross_attention"]["mlp"]["up"]["kernel"].shape == (16, 48)
    assert made["self_attention_1"]["mlp"]["up"]["kernel"].shape == (16, 80)


def test_initial_weights_are_normal_with_init_scale_biases_0_and_norms_1_and_0():
    config = small_config(num_channels=64, init_scale=0.05)
    params = quick_jit(lambda: init_params(PerceiverAR(config), jax.random.key(0)))()
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key in ("kernel", "embedding"):
            tolerance = 4 / math.sqrt(leaf.size)
            assert abs(leaf.mean()) < 0.05 * tolerance, path
            assert abs(leaf.std() / 0.05 - 1) < tolerance, path
        else:
            np.testing.assert_array_equal(leaf, float(path[-1].key == "scale"), str(path))
