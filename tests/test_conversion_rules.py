import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from reference_tensors import CONFIGS, SMALL, assert_same_bits, random_tensors

from perceiver_ar_jax.conversion import (
    read_reference,
    readers,
    to_flax,
    to_torch,
    write_reference,
)
from perceiver_ar_jax.conversion.perceiver_io import (
    FREQUENCIES,
    PERCEIVER_IO,
    TOKEN_EMBEDDING,
    rotary_channel_order,
)
from perceiver_ar_jax.conversion.reference_config import config_from_reference, config_to_reference
from perceiver_ar_jax.conversion.rules import torch_shape
from perceiver_ar_jax.model import PerceiverAR


def with_frequencies(config, tensors):
    return config.replace(
        rotary_inv_freq=tuple(tensors[FREQUENCIES].tolist()),
        param_dtype=tensors[TOKEN_EMBEDDING].dtype,
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_round_trips_give_every_bit_back(name, dtype):
    tensors = random_tensors(CONFIGS[name], dtype)
    config = with_frequencies(CONFIGS[name], tensors)
    params = to_flax(tensors, config)
    exported = to_torch(params, config)
    assert_same_bits(exported, tensors)
    leaves = PERCEIVER_IO.checked_leaves(params, config)
    assert_same_bits(PERCEIVER_IO.checked_leaves(to_flax(exported, config), config), leaves)


@pytest.mark.parametrize("name", CONFIGS)
def test_converted_parameters_are_those_the_model_asks_for(name):
    config = CONFIGS[name]
    tokens = jax.ShapeDtypeStruct((1, config.max_seq_len), np.int32)
    init = lambda key, x: PerceiverAR(config).init(key, x, config.max_prefix_len)["params"]
    expected = jax.eval_shape(init, jax.random.key(0), tokens)
    tensors = random_tensors(config)
    converted = to_flax(tensors, with_frequencies(config, tensors))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)
    assert shapes(converted) == shapes(expected)


def test_jax_takes_converted_parameters_over_without_a_copy():
    tensors = random_tensors(CONFIGS["no layers"])
    params = to_flax(tensors, with_frequencies(CONFIGS["no layers"], tensors))
    for leaf in jax.tree.leaves(params):
        assert jax.device_put(leaf).unsafe_buffer_pointer() == leaf.ctypes.data


def test_rotated_channels_come_as_two_halves_the_rest_stays():
    config = CONFIGS["absolute positions"]  # 2 heads of 8 channels, of which 4 rotate
    order = [0, 2, 1, 3, 4, 5, 6, 7]
    assert rotary_channel_order(config).tolist() == [*order, *(8 + i for i in order)]


def test_every_parameter_of_the_table_has_its_own_names():
    for config in CONFIGS.values():
        table = PERCEIVER_IO.of_model(config)
        assert len({rule.flax for rule in table}) == len({rule.torch for rule in table})


def test_the_455m_model_has_its_published_size():
    config = CONFIGS["absolute positions"].clm_base()
    shapes = [torch_shape(rule, config) for rule in PERCEIVER_IO.of_model(config)]
    assert sum(map(np.prod, shapes)) == 453_950_720
    assert len(shapes) + 1 == 217


def test_one_error_lists_what_is_missing_left_over_and_misshapen():
    config = CONFIGS["absolute positions"]
    tensors = random_tensors(config)
    del tensors["output_adapter.bias"]
    tensors["loss.weight"] = np.zeros((3, 4))
    tensors[TOKEN_EMBEDDING] = np.zeros((21, 16))
    with pytest.raises(ValueError) as error:
        to_flax(tensors, config)
    assert "1 missing: output_adapter.bias (vocab_size 20)" in str(error.value)
    assert "1 left over: loss.weight (3, 4)" in str(error.value)
    assert (
        "input_adapter.txt_embedding.weight (21, 16), not (vocab_size 20, num_channels 16)"
        in str(error.value)
    )


def test_export_names_parameters_that_do_not_fit_the_config():
    config = CONFIGS["rotary only"]
    tensors = random_tensors(config)
    params = to_flax(tensors, with_frequencies(config, tensors))
    params["head"] = {"kernel": np.zeros((2, 2))}
    del params["self_attention_1"]["mlp"]["down"]
    with pytest.raises(
        ValueError, match=r"missing: self_attention_1/mlp/down/kernel .*head/kernel"
    ):
        to_torch(params, config)


def test_frequencies_other_than_the_configs_are_refused():
    config = CONFIGS["rotary only"]
    with pytest.raises(ValueError, match="rotary_inv_freq differs"):
        to_flax(random_tensors(config), config)


def test_more_layers_than_tensors_are_refused_before_the_table_is_unrolled():
    config = CONFIGS["rotary only"]
    with pytest.raises(ValueError, match="asks for 1000000000 self-attention layers"):
        to_flax(random_tensors(config), config.replace(num_self_attention_layers=10**9))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_fields_go_both_ways(name):
    config = CONFIGS[name]
    assert config_from_reference(config_to_reference(config)) == config


def test_old_files_lack_fields_that_get_their_defaults_in_silence():
    fields = config_to_reference(CONFIGS["rotary only"])
    for name in ("residual_dropout", "num_self_attention_rotary_layers"):
        del fields[name]
    config = config_from_reference(fields)
    assert (config.residual_dropout, config.num_self_attention_rotary_layers) == (0.0, 1)


def test_other_missing_fields_and_offloading_are_warned_of():
    fields = config_to_reference(CONFIGS["rotary only"])
    with pytest.warns(UserWarning, match="offloading"):
        config_from_reference(fields | {"activation_offloading": True})
    del fields["num_heads"]
    with pytest.warns(UserWarning, match="lacks num_heads"):
        config_from_reference(fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": "8"},
        {"vocab_size": [1]},
        {"num_heads": None},
        {"residual_dropout": None},
        {"num_channels": 17},
        {"init_scale": float("nan")},
        {"max_latents": 2.5},
    ],
    ids=str,
)
def test_impossible_config_values_raise_one_line(changes):
    with pytest.raises(ValueError) as error:
        config_from_reference(config_to_reference(CONFIGS["rotary only"]) | changes)
    assert next(iter(changes)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_second_source_is_another_value_of_rules(tmp_path, monkeypatch):
    table = tuple(rule._replace(torch=f"other.{rule.torch}") for rule in PERCEIVER_IO.table)
    other = dataclasses.replace(
        PERCEIVER_IO,
        name="other",
        model_type="other-ar",
        anchor=f"other.{TOKEN_EMBEDDING}",
        table=table,
        read_config=lambda content, path: config_from_reference(content["fields"]),
        write_config=lambda config: {
            "model_type": "other-ar",
            "fields": config_to_reference(config),
        },
        written_prefix="",
    )
    monkeypatch.setattr(readers, "SOURCES", (PERCEIVER_IO, other))
    tensors = random_tensors(SMALL)
    config = with_frequencies(SMALL, tensors)
    params = to_flax(tensors, config)
    write_reference(tmp_path / "theirs", params, config)
    write_reference(tmp_path / "other", params, config, rules=other)
    found = [read_reference(tmp_path / name) for name in ("theirs", "other")]
    assert [checkpoint.rules.name for checkpoint in found] == ["perceiver-io", "other"]
    assert f"other.{TOKEN_EMBEDDING}" in found[1].tensors
    assert found[0].config == found[1].config
    converted = [checkpoint.rules.to_flax(checkpoint.tensors, config) for checkpoint in found]
    jax.tree.map(np.testing.assert_array_equal, *converted)
