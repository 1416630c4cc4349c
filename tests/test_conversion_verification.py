import sys

import numpy as np
import pytest
from reference_tensors import CONFIGS, SMALL, random_tensors

from perceiver_ar_jax.conversion import to_flax, verification
from perceiver_ar_jax.conversion.certificate import describe_model
from perceiver_ar_jax.conversion.perceiver_io import (
    FREQUENCIES,
    PERCEIVER_IO,
)


def converted(config):
    tensors = random_tensors(config)
    frequencies = tuple(tensors[FREQUENCIES].tolist())
    config = config.replace(rotary_inv_freq=frequencies)
    return tensors, to_flax(tensors, config), config


def test_equal_logits_pass_with_a_difference_of_zero():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    assert verification.compare(logits, logits) == (0.0, np.abs(logits).max(), 0.0, 0.0)
    assert verification.compare(logits, logits).passed


def test_kl_divergence_is_that_of_the_formula():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    compared = verification.compare(np.log(p)[None, None], np.log(q)[None, None] + 7)
    assert compared.max_kl == pytest.approx(0.25 * np.log(2))


@pytest.mark.parametrize("wrong", [0.1, np.nan])
def test_a_single_wrong_logit_does_not_pass(wrong):
    logits = np.ones((1, 4, 5), np.float32)
    other = logits.copy()
    other[0, 2, 3] += wrong
    assert not verification.compare(logits, other).passed


def test_random_rows_are_left_padded_within_the_prefix():
    config = SMALL.replace(max_seq_len=50)
    tokens, prefix_len, pads = verification.random_inputs(config, rows=20)
    assert (tokens.shape, prefix_len) == ((20, 50), 46)
    assert not pads[0].any() and not pads[:, prefix_len:].any() and pads[:, 0].any()
    assert (np.diff(pads.astype(int), axis=1) <= 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_right_conversion_gives_every_tensor_back(name):
    assert verification.differing_tensors(PERCEIVER_IO, *converted(CONFIGS[name])) == []


def test_one_flipped_bit_and_one_swap_are_named():
    tensors, params, config = converted(SMALL)
    params["self_attention_0"]["mlp"]["up"]["kernel"].view(np.uint8)[0, 0] ^= 1
    norms = params["cross_attention"]
    norms["q_norm"], norms["kv_norm"] = norms["kv_norm"], norms["q_norm"]
    assert verification.differing_tensors(PERCEIVER_IO, tensors, params, config) == [
        "cross_attention.0.module.q_norm.weight",
        "cross_attention.0.module.q_norm.bias",
        "cross_attention.0.module.kv_norm.weight",
        "cross_attention.0.module.kv_norm.bias",
        "self_attention.0.1.module.1.weight",
    ]


def test_without_the_reference_an_import_error_says_so(monkeypatch):
    tensors, _, config = converted(SMALL)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch and perceiver-io do not import"):
        PERCEIVER_IO.logits(tensors, config, *verification.random_inputs(config, 1))


def test_the_certificate_counts_parameters_and_measures_tensors():
    tensors, _, config = converted(SMALL)
    tensors["output_adapter.bias"][:] = 0
    tensors["output_adapter.bias"][3] = -2.5
    described = describe_model(tensors, config)
    assert described["parameters"] == sum(x.size for x in tensors.values()) - 2
    assert described["tensors"]["output_adapter.bias"]["max_abs"] == 2.5
    assert described["tensors"]["output_adapter.bias"]["shape"] == [20]
    assert described["inverse_frequencies"]["max_abs_stored_minus_bf16_formula"] == 0
