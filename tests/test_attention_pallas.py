"""The Pallas kernels over several blocks, interpreted; test_compile_ahead.py compiles them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import quick_jit

from perceiver_ar_jax.model.attention import Dropout, Visibility, pallas, recompute

LATENTS = 400  # two blocks of 256, each of two strips; the last is padded


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name in ("FORWARD_BLOCKS", "BACKWARD_BLOCKS"):
        monkeypatch.setattr(pallas, name, pallas.Blocks(256, 256))


def value_and_gradients(attend, num_keys, visibility, dtype, heads=2):
    of_queries, of_keys = (2, LATENTS, heads, 8), (2, num_keys, heads, 8)
    shapes = of_queries, of_keys, of_keys, of_queries
    *inputs, weights = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16).astype(dtype)
        for i, shape in enumerate(shapes)
    )

    def loss(q, k, v):
        out, lse = attend(q, k, v, visibility)
        seen = lse > -1e30  # that of a query without keys is only a very low number
        return (out * weights).sum(dtype=jnp.float32) + jnp.where(seen, jnp.sin(lse), 0).sum(), out

    (_, out), gradients = quick_jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


def visibility(num_keys, hidden):
    rng = np.random.default_rng(0)
    pads = rng.random((2, num_keys)) < 0.3 if "pads" in hidden else None
    if "documents" in hidden:
        queries, keys = (np.sort(rng.integers(0, 4, (2, n))) for n in (LATENTS, num_keys))
    causal = num_keys == LATENTS
    if "documents" not in hidden:
        return Visibility(pads, causal=causal)
    return Visibility(pads, keys if causal else queries, keys, causal)


@pytest.mark.parametrize(
    ("num_keys", "hidden"),
    [
        (LATENTS, ()),
        (LATENTS, ("pads", "documents")),
        (300, ()),
        (512, ("pads",)),
        (300, ("documents",)),
    ],
    ids=str,
)
def test_blocks_give_the_values_and_gradients_of_the_einsum(num_keys, hidden):
    visible = visibility(num_keys, hidden)
    ours, expected = (
        value_and_gradients(implementation.attend, num_keys, visible, jnp.float32)
        for implementation in (pallas, recompute)
    )
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


def test_bf16_gradients_are_as_close_as_those_of_the_einsum():
    visible = visibility(LATENTS, ("pads", "documents"))
    exact = value_and_gradients(recompute.attend, LATENTS, visible, jnp.float32, heads=1)

    def distances(attend):
        results = value_and_gradients(attend, LATENTS, visible, jnp.bfloat16, heads=1)
        return [np.abs(x.astype(float) - y).mean() for x, y in zip(results, exact, strict=True)]

    ours, einsum = distances(pallas.attend), distances(recompute.attend)
    assert all(x < 1.1 * y for x, y in zip(ours, einsum, strict=True)), (ours, einsum)


@pytest.mark.parametrize(
    ("length", "largest", "expected"),
    [(5, 512, 128), (512, 512, 512), (640, 512, 384), (65_536, 1024, 1024), (16_128, 1024, 896)],
)
def test_a_block_balances_padding_and_the_number_of_blocks(length, largest, expected):
    assert pallas._block(length, largest) == expected


def test_dropout_of_weights_is_refused():
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match="no dropout of weights"):
        pallas.attend(x, x, x, Visibility(), Dropout(0.5, jax.random.key(0)))
