import functools

import jax
import numpy as np
import pytest
from sharded_training import CONFIG, mesh_of, train
from small_models import random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR, generate
from perceiver_ar_jax.model import init_params, parameter_shardings
from perceiver_ar_jax.parallel import (
    MeshConfig,
    batch_share,
    check_batch_size,
    constrain,
    make_mesh,
    use_mesh,
)
from perceiver_ar_jax.training import state_shardings

MESHES = (
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 2, "data": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
)


@functools.cache
def on_one_device():
    metrics, state = train(mesh_of(1))
    return metrics, jax.device_get(state.params)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_mesh_trains_as_one_device_does(axes):
    metrics, state = train(mesh_of(**axes))
    expected_metrics, expected_params = on_one_device()
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4),
        jax.device_get(state.params),
        expected_params,
    )


def test_two_runs_on_a_mesh_are_bit_equal():
    first, second = (train(mesh_of(data=2, fsdp=2, tensor=2)) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.device_get(x[1].params) for x in (first, second))
    )


def test_state_stays_sharded_through_a_step():
    mesh = mesh_of(fsdp=4, tensor=2)
    _, state = train(mesh)
    kernel = state.params["self_attention_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16 // 4, 32 // 2)
    expected = state_shardings(state, mesh)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_activations_are_cut_by_logical_name_and_left_alone_without_a_mesh():
    x = np.zeros((8, 4, 2), np.float32)
    layout = jax.jit(lambda x: constrain(x, "batch", None, None))
    assert len(layout(x).sharding.device_set) == 1
    mesh = mesh_of(data=2, fsdp=4)
    on_mesh = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P()))
    with use_mesh(mesh):
        assert layout(on_mesh).sharding.shard_shape(x.shape) == (1, 4, 2)
        assert layout(on_mesh[:3]).sharding.shard_shape((3, 4, 2)) == (3, 4, 2)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3}, "data=3 × fsdp=1 × tensor=1 × context=1 = 3 devices, but there are 8"),
        ({"data": -1, "fsdp": 3}, "8 devices are not a multiple of 3"),
        ({"data": -1, "fsdp": -1}, "at most one size is -1"),
        ({"data": 0}, "sizes are positive"),
    ],
)
def test_an_impossible_mesh_fails_with_the_arithmetic(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**axes))


def test_a_width_that_does_not_divide_fails_with_the_arithmetic():
    model = PerceiverAR(small_config(num_channels=12, num_heads=2))
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    with pytest.raises(ValueError, match="12 does not divide by fsdp = 8"):
        parameter_shardings(shapes, mesh_of(fsdp=8))


def test_a_batch_that_does_not_divide_fails_with_the_arithmetic():
    mesh = mesh_of(data=2, fsdp=4)
    check_batch_size(16, mesh, microbatches=2)
    with pytest.raises(ValueError, match="batch_size 12 is not a multiple of data=2 × fsdp=4 = 8"):
        check_batch_size(12, mesh)
    with pytest.raises(ValueError, match="fsdp=4 × 3 microbatches = 24"):
        check_batch_size(16, mesh, microbatches=3)


class _Process:
    """A device that is in another process than its neighbour."""

    def __init__(self, process_index):
        self.process_index = process_index


class _FakeMesh:
    def __init__(self, processes):
        self.shape = {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
        self.devices = np.array([_Process(x) for x in processes]).reshape(1, 4, 2, 1)


@pytest.mark.parametrize(
    ("processes", "shares"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),  # two rows groups each
        ([0, 1, 0, 1, 0, 1, 0, 1], [(0, 1), (0, 1)]),  # halves of the same rows
        ([0, 1, 0, 1, 2, 3, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_that_hold_the_same_rows_feed_the_same_share(processes, shares):
    mesh = _FakeMesh(processes)
    assert [batch_share(mesh, index) for index in range(len(shares))] == shares


def test_processes_that_share_rows_in_part_are_refused():
    with pytest.raises(ValueError, match="in part"):
        batch_share(_FakeMesh([0, 0, 0, 1, 1, 1, 1, 1]), 0)


def test_generate_gives_the_same_tokens_with_sharded_parameters():
    params = random_params(CONFIG)
    mesh = mesh_of(fsdp=4, tensor=2)
    sharded = jax.device_put(params, parameter_shardings(params, mesh))
    model = PerceiverAR(CONFIG)
    prompt = random_tokens(CONFIG, 9, batch=3)
    tokens = generate(model, params, prompt, num_latents=2, max_new_tokens=8)
    np.testing.assert_array_equal(
        generate(model, sharded, prompt, num_latents=2, max_new_tokens=8), tokens
    )
    with use_mesh(mesh):
        np.testing.assert_array_equal(
            generate(model, sharded, prompt, num_latents=2, max_new_tokens=8), tokens
        )


@pytest.mark.parametrize(
    ("devices", "data", "fsdp"),
    [(1, 1, 1), (4, 1, 4), (8, 1, 8), (12, 3, 4), (16, 1, 16), (24, 3, 8), (256, 16, 16)],
)
def test_a_fitted_mesh_takes_what_the_devices_and_the_model_allow(devices, data, fsdp):
    config = MeshConfig(data=-1, fsdp=-1, max_fsdp=16)
    assert config.sizes(devices, num_channels=1280) == (data, fsdp, 1, 1)


def test_a_fitted_mesh_leaves_room_for_explicit_axes_and_stays_strict_with_them():
    config = MeshConfig(data=-1, fsdp=-1, tensor=2, max_fsdp=16)
    assert config.sizes(8, num_channels=1280) == (1, 4, 2, 1)
    with pytest.raises(ValueError, match="7 devices are not a multiple of 2"):
        config.sizes(7)
    with pytest.raises(ValueError, match="= 8 devices, but there are 6"):
        MeshConfig(data=1, fsdp=8, max_fsdp=16).sizes(6)
