"""The context axis: the keys of the first layer are spread over devices along their length."""

import jax
import numpy as np
import pytest
from sharded_training import mesh_of
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.parallel import replicated, use_mesh

CONFIG = small_config(max_seq_len=24, max_latents=8, remat="names")
BATCH = 4


def logits_and_gradients(config=CONFIG, mesh=None):
    params = random_params(config)
    tokens = random_tokens(config, config.max_seq_len, BATCH)
    prefix_len = config.max_prefix_len
    pads = left_pads([0, 3, 17, 5], config.max_seq_len)  # one row's prefix is nothing but padding

    def loss(params, tokens, pads):
        logits = PerceiverAR(config).apply({"params": params}, tokens, prefix_len, pads)
        return -jax.nn.log_softmax(logits)[..., 0].mean(), logits

    compiled = quick_jit(jax.value_and_grad(loss, has_aux=True))
    inputs = params, tokens, pads
    if mesh is None:
        return compiled, inputs
    return compiled, jax.device_put(inputs, replicated(mesh))


@pytest.fixture(scope="module")
def expected():
    compiled, inputs = logits_and_gradients()
    return jax.device_get(compiled(*inputs))


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ({"context": 8}, {}),
        ({"data": 2, "tensor": 2, "context": 2}, {"remat": "none"}),
        ({"data": 2, "context": 4}, {"max_heads_parallel": 1}),
        ({"context": 8}, {"prefix_chunk": 3}),  # each device has 2 of the 16 positions
        ({"data": 2, "context": 2, "tensor": 2}, {"prefix_chunk": 3}),
        ({"data": 2, "context": 2, "tensor": 2}, {"prefix_chunk": 5, "attention": "pallas"}),
        ({"fsdp": 2, "data": 4}, {"prefix_chunk": 5, "remat": "full"}),
        ({"data": 2, "tensor": 2, "context": 2}, {"attention": "pallas"}),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_the_unsharded_model(axes, changes, expected):
    mesh = mesh_of(**axes)
    with use_mesh(mesh):
        compiled, inputs = logits_and_gradients(CONFIG.replace(**changes), mesh)
        actual = jax.device_get(compiled(*inputs))
    # Logits of up to 3: a log-sum-exp is rounded to a unit in its last place before each merge.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), actual, expected)
