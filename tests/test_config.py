import dataclasses
import json
import re

import pytest
from small_models import small_config

from perceiver_ar_jax import PerceiverARConfig
from perceiver_ar_jax.config import COMPUTATION, ROLES, fields_with_role, reference_fields
from perceiver_ar_jax.presets import preset
from perceiver_ar_jax.run_config import RunConfig


def test_the_defaults_are_valid_and_are_the_30m_model():
    assert PerceiverARConfig() == PerceiverARConfig.bytes_small()


def test_presets_take_changes():
    config = PerceiverARConfig.clm_base(remat="names", max_seq_len=2048)
    assert (config.remat, config.max_seq_len, config.num_channels) == ("names", 2048, 1280)
    assert PerceiverARConfig.bytes_small(max_latents=256).max_prefix_len == 4096 - 256


def test_a_preset_may_be_changed_in_several_ways_that_are_valid_only_together():
    config = PerceiverARConfig.clm_base(num_channels=96, num_heads=12)
    assert config.head_dim == 8


def test_a_config_is_frozen_and_hashable():
    config = small_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 4
    assert {config: 1}[small_config()] == 1


@pytest.mark.parametrize("frequencies", [None, (1.0, 0.25)])
def test_to_dict_is_json_and_from_dict_its_inverse(frequencies):
    config = small_config(dtype="bfloat16", rotary_inv_freq=frequencies, max_heads_parallel=2)
    fields = json.loads(json.dumps(config.to_dict()))
    assert PerceiverARConfig.from_dict(fields) == config
    assert fields.keys() == {field.name for field in dataclasses.fields(config)}


def test_missing_fields_take_their_defaults():
    assert PerceiverARConfig.from_dict({"vocab_size": 5}) == PerceiverARConfig(vocab_size=5)


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="PerceiverARConfig has no field num_head, widht"):
        PerceiverARConfig.from_dict({"widht": 3, "num_head": 2, "num_heads": 2})


def test_all_problems_come_in_one_message():
    with pytest.raises(ValueError) as error:
        PerceiverARConfig(
            vocab_size=0, num_heads=2.0, residual_dropout=1.5, remat="some", init_scale=-1.0
        )
    assert str(error.value) == (
        "PerceiverARConfig: vocab_size must be a whole number of at least 1, not 0; "
        "num_heads must be a whole number of at least 1, not 2.0; "
        "residual_dropout must be a number between 0 and 1, not 1.5; "
        "init_scale must be a finite number of at least 0, not -1.0; "
        "remat must be one of none, full, names, auto, not 'some'"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_latents": 15}, "max_latents 15 exceeds max_seq_len 14"),
        ({"num_heads": 3}, "num_channels 16 is not a multiple of num_heads 3"),
        ({"num_channels": 6, "abs_pos_emb": False}, "an even head width, not 3"),
        ({"num_self_attention_rotary_layers": -2}, "at least -1, not -2"),
        ({"num_self_attention_layers": -1}, "at least 0, not -1"),
        ({"num_heads": True}, "num_heads must be a whole number of at least 1, not True"),
        ({"max_heads_parallel": 0}, "max_heads_parallel must be a whole number of at least 1"),
        ({"cross_attention_dropout": -0.1}, "dropout must be a number between 0 and 1, not -0.1"),
        ({"residual_dropout": float("nan")}, "dropout must be a number between 0 and 1, not nan"),
        ({"init_scale": float("inf")}, "init_scale must be a finite number of at least 0, not inf"),
        ({"init_scale": float("nan")}, "init_scale must be a finite number of at least 0, not nan"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, not 'float16'"),
        ({"param_dtype": "int32"}, "param_dtype must be float32 or bfloat16, not 'int32'"),
        ({"attention": "magic"}, "attention must be one of auto, plain, recompute, pallas, cudnn"),
        (
            {"rotary_inv_freq": (1.0,)},
            "rotary_inv_freq has 1 entries where the head width asks for 2",
        ),
        (
            {"rotary_inv_freq": (1.0, float("nan"))},
            r"rotary_inv_freq must be finite numbers, not \(1.0, nan\)",
        ),
    ],
    ids=str,
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_values_of_the_wrong_type_all_come_in_one_message_too():
    values = {
        "vocab_size": "48",
        "num_heads": None,
        "max_latents": True,
        "cross_attention_dropout": True,
        "residual_dropout": "0.1",
        "init_scale": "x",
        "output_norm": 1,
        "abs_pos_emb": "no",
        "dtype": "float7",
        "param_dtype": 3,
        "remat": ["full"],
        "rotary_inv_freq": (1.0, "fast"),
    }
    with pytest.raises(ValueError) as error:
        small_config(**values)
    for name, value in values.items():
        assert re.search(f" {name} must be [^;]*, not {re.escape(repr(value))}", str(error.value))


@pytest.mark.parametrize("rotary_layers, expected", [(-1, 2), (0, 0), (1, 1), (2, 2), (7, 2)])
def test_minus_one_means_that_all_layers_rotate(rotary_layers, expected):
    assert (
        small_config(num_self_attention_rotary_layers=rotary_layers).num_rotary_layers == expected
    )


@pytest.mark.parametrize(
    "head_dim, abs_pos_emb, rotated", [(8, True, 4), (8, False, 8), (6, True, 4), (2, True, 2)]
)
def test_half_of_the_channels_rotate_with_absolute_positions_rounded_up_to_pairs(
    head_dim, abs_pos_emb, rotated
):
    config = small_config(num_channels=2 * head_dim, abs_pos_emb=abs_pos_emb)
    assert config.num_rotated_channels == rotated


def test_c4_base_is_clm_base():
    config = RunConfig.from_config(preset("c4_base"))
    clm_base = PerceiverARConfig.clm_base(dtype="bfloat16", remat="auto")
    assert config.model == clm_base
    assert config.batch_size * config.steps * clm_base.max_latents == 52_428_800_000


def test_every_field_has_a_role_and_a_check():
    for field in dataclasses.fields(PerceiverARConfig):
        assert field.metadata["role"] in ROLES
        checks = field.metadata.keys() & {"at_least", "at_most", "choices", "optional"}
        assert checks or isinstance(field.default, bool), field.name


def test_fields_of_a_role_and_of_perceiver_io_come_in_the_order_of_the_config():
    assert fields_with_role(COMPUTATION)[:2] == ("max_heads_parallel", "dtype")
    assert set().union(*map(fields_with_role, ROLES)) == PerceiverARConfig().to_dict().keys()
    assert reference_fields()[0] == "vocab_size"
    assert reference_fields()[-1] == "init_scale"
