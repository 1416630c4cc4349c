import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from perceiver_ar_jax.training import losses


def example(vocab_size, biased):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden_BLD = jax.random.normal(keys[0], (2, 6, 8))
    embedding_VD = jax.random.normal(keys[1], (vocab_size, 8))
    bias_V = jax.random.normal(keys[2], (vocab_size,)) if biased else None
    targets_BL = jax.random.randint(keys[3], (2, 6), 0, vocab_size)
    weights_BL = (jax.random.uniform(keys[4], (2, 6)) < 0.7).astype(jnp.float32)
    return hidden_BLD, embedding_VD, bias_V, targets_BL, weights_BL


def plain(hidden_BLD, embedding_VD, bias_V, targets_BL, weights_BL):
    logits_BLV = hidden_BLD @ embedding_VD.T + (0 if bias_V is None else bias_V)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
    return (nats * weights_BL).sum()


@pytest.mark.parametrize("chunk", [1, 2, 6])
@pytest.mark.parametrize("biased", [True, False])
def test_chunks_give_the_loss_and_gradients_of_the_whole(monkeypatch, chunk, biased):
    monkeypatch.setattr(losses, "MAX_LOGITS_PER_ROW", chunk * 11)
    arguments = example(11, biased)
    wanted = (0, 1, 2) if biased else (0, 1)
    value, gradients = jax.value_and_grad(losses.cross_entropy, wanted)(*arguments)
    expected, expected_gradients = jax.value_and_grad(plain, wanted)(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(*arguments), expected, rtol=1e-6)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, gradient, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_have_the_dtype_of_what_they_are_taken_of(dtype):
    hidden_BLD, embedding_VD, bias_V, *rest = example(11, True)
    floats = hidden_BLD.astype(jnp.bfloat16), embedding_VD.astype(dtype), bias_V.astype(dtype)
    gradients = jax.grad(losses.cross_entropy, (0, 1, 2))(*floats, *rest)
    assert [x.dtype for x in gradients] == [x.dtype for x in floats]


def test_a_large_vocabulary_never_makes_all_logits_at_once():
    shapes = []

    def record(jaxpr):
        for equation in jaxpr.eqns:
            shapes.extend(v.aval.shape for v in equation.outvars)
            jax.tree.map(
                lambda x: record(x.jaxpr) if hasattr(x, "jaxpr") else None,
                list(equation.params.values()),
                is_leaf=lambda x: hasattr(x, "jaxpr"),
            )

    batch, latents, vocab_size, width = 2, 512, 128_000, 4
    arguments = (
        jnp.zeros((batch, latents, width)),
        jnp.zeros((vocab_size, width)),
        None,
        jnp.zeros((batch, latents), jnp.int32),
        jnp.ones((batch, latents)),
    )
    record(jax.make_jaxpr(jax.grad(losses.cross_entropy, (0, 1)))(*arguments).jaxpr)
    largest = max(int(np.prod(shape)) for shape in shapes)
    assert batch * vocab_size <= largest <= batch * latents * vocab_size // 4


def test_positions_of_weight_zero_do_not_count_or_learn():
    hidden_BLD, embedding_VD, bias_V, targets_BL, _ = example(11, True)
    weights_BL = jnp.zeros((2, 6)).at[0, 3].set(1.0)
    gradient = jax.grad(losses.cross_entropy)(
        hidden_BLD, embedding_VD, bias_V, targets_BL, weights_BL
    )
    assert bool((gradient[0, 3] != 0).any())
    assert not bool(gradient.at[0, 3].set(0).any())
