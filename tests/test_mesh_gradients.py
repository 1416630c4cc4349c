"""How gradients are added up: over microbatches, over devices, in which precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_training import CONFIG, mesh_of, train

NO_DROPOUT = CONFIG.replace(cross_attention_dropout=0.0, residual_dropout=0.0)


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2, "fsdp": 2}], ids=str)
def test_microbatches_train_as_the_whole_batch_does(axes):
    mesh = mesh_of(num_devices=int(np.prod(list(axes.values()))), **axes)
    whole, _ = train(mesh_of(1), NO_DROPOUT)
    parts, _ = train(mesh, NO_DROPOUT, microbatches=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_microbatches_work_with_dropout():
    losses, _ = train(mesh_of(4, data=2, fsdp=2), microbatches=2)
    assert np.isfinite(losses).all()


def test_gradients_of_bf16_computation_are_summed_in_the_dtype_of_choice(monkeypatch):
    from perceiver_ar_jax.model import products as model_products
    from perceiver_ar_jax.model.layers import Dense

    # On CPU all of bfloat16 is summed in float32.
    monkeypatch.setattr(model_products, "platform_in_use", lambda: "tpu")

    def products(gradient_dtype):
        config = NO_DROPOUT.replace(dtype="bfloat16", gradient_dtype=gradient_dtype)
        dense = Dense(8, config)
        x = jnp.ones((4, 16), jnp.bfloat16)
        params = dense.init(jax.random.key(0), x)
        gradient = jax.grad(lambda params: dense.apply(params, x).sum().astype(jnp.float32))
        return str(jax.make_jaxpr(gradient)(params)).count("f32[16,8] = dot_general")

    assert products("float32") > products("bfloat16") == 0
