import jax
import numpy as np
import pytest
from small_models import random_params, small_config

from perceiver_ar_jax import PerceiverAR, generate
from perceiver_ar_jax.generation import prefill, stream
from perceiver_ar_jax.model import parameter_shardings
from perceiver_ar_jax.parallel import MeshConfig, make_mesh

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [*range(10, 20)], [9, 9, 9]]
OPTIONS = {"num_latents": 2, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def unsharded():
    model = PerceiverAR(small_config(num_heads=4))
    return model, random_params(model.config)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), {}),
        (MeshConfig(data=8), {}),  # more devices than prompts
        (MeshConfig(data=2, tensor=4), {"policy": "reset"}),
        (MeshConfig(data=2, tensor=4), {"num_beams": 2}),
        (MeshConfig(data=4, tensor=2), {"penalty_alpha": 0.6, "top_k": 3}),
    ],
    ids=str,
)
def test_sharded_parameters_give_the_same_tokens(unsharded, mesh, options):
    model, params = unsharded
    expected = generate(model, params, PROMPTS, **OPTIONS, **options)
    spread = jax.device_put(params, parameter_shardings(params, make_mesh(mesh)))
    actual = generate(model, spread, PROMPTS, **OPTIONS, **options)
    np.testing.assert_array_equal(actual, expected)


def test_sharded_parameters_stream_the_same_tokens(unsharded):
    model, params = unsharded
    expected = generate(model, params, PROMPTS, **OPTIONS)[:, -20:]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(params, parameter_shardings(params, mesh))
    streamed = np.stack(list(stream(model, spread, PROMPTS, **OPTIONS)), axis=1)
    np.testing.assert_array_equal(streamed, expected)


def test_caches_of_a_batch_are_spread_over_the_data_axis(unsharded):
    model, params = unsharded
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    spread = jax.device_put(params, parameter_shardings(params, mesh))
    values = prefill(model, spread, PROMPTS, num_latents=2).context.cache.cross.v
    assert values.sharding.shard_shape(values.shape)[0] == 1
