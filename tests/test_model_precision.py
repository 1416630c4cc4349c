import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.model import init_params

TOKENS = random_tokens(small_config(), 12)
PADS = left_pads([0, 9], 12)


def run(config, method=None):
    apply = lambda params: PerceiverAR(config).apply(
        {"params": params}, TOKENS, 7, PADS, method=method
    )
    return quick_jit(apply)(random_params(config))


@pytest.mark.parametrize("changes", [{}, {"output_norm": False}, {"scan_layers": True}], ids=str)
def test_bf16_computation_stays_near_float32_and_gives_float32_logits(changes):
    config = small_config(**changes)
    exact, rounded = run(config), run(config.replace(dtype="bfloat16"))
    assert rounded.dtype == exact.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() < 0.04 * np.abs(exact).max()


@pytest.mark.parametrize("changes", [{}, {"output_norm": False}], ids=str)
def test_the_head_reads_the_dtype_of_the_computation(changes):
    for dtype in ("float32", "bfloat16"):
        assert run(small_config(dtype=dtype, **changes), method="hidden").dtype == dtype


def test_parameters_and_their_gradients_are_float32_under_bf16_computation():
    config = small_config(dtype="bfloat16")
    model = PerceiverAR(config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    loss = lambda params: model.apply({"params": params}, TOKENS, 7).mean()
    for tree in (params, jax.eval_shape(jax.grad(loss), params)):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}


def test_bf16_parameters_are_a_setting_of_their_own():
    config = small_config(param_dtype="bfloat16")
    params = jax.eval_shape(lambda: init_params(PerceiverAR(config), jax.random.key(0)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert run(config).dtype == jnp.float32


def test_norms_and_softmax_are_float32_under_bf16_computation_and_products_are_not():
    config = small_config(dtype="bfloat16")
    model, params = PerceiverAR(config), random_params(config)
    jaxpr = jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS, 7))(params)
    dtypes = {"rsqrt": set(), "exp": set(), "dot_general": set()}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in dtypes:
                dtypes[equation.primitive.name].add(equation.invars[0].aval.dtype.name)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(inner):
                    visit(inner.jaxpr)

    is_jaxpr = lambda x: hasattr(x, "jaxpr")
    visit(jaxpr.jaxpr)
    assert dtypes == {"rsqrt": {"float32"}, "exp": {"float32"}, "dot_general": {"bfloat16"}}


def test_the_residual_stream_is_float32_under_bf16_computation():
    config = small_config(abs_pos_emb=False, output_bias=False)
    params = jax.tree.map(np.zeros_like, random_params(config))  # no branch adds anything
    rng = np.random.default_rng(0)
    small = rng.standard_normal(params["token_embedding"]["embedding"].shape)
    params["token_embedding"]["embedding"] += 1024 + small  # in bf16, steps of 4 up from 512
    params["out_norm"]["scale"] += 1

    def hidden(dtype):
        model = PerceiverAR(config.replace(dtype=dtype))
        return quick_jit(lambda: model.apply({"params": params}, TOKENS, 7, method="hidden"))()

    np.testing.assert_allclose(hidden("bfloat16").astype(float), hidden("float32"), atol=0.02)
