"""More than 32,768 rows of prefix against float64.

On CPU, jax 0.10.2 compiles `jit(vmap(lambda row: jnp.sum((M @ row) ** 2)))`, M small, to a
program that is silently wrong from 32,769 float32 rows up (jax issue 39103, fixed in 0.11). The
model has no such sum today; a formulation that brings one fails here.
"""

import jax
import numpy as np
import pytest
from float64_model import float64_logits
from small_models import left_pads, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR

PREFIX_LEN = 40_000
CONFIG = small_config(
    max_seq_len=PREFIX_LEN + 4,
    max_latents=4,
    num_channels=6,  # the smaller the matrices, the likelier the compiler fuses them
    num_self_attention_layers=1,
)
PADS = left_pads([0, 70], CONFIG.max_seq_len)


@pytest.fixture(scope="module")
def tokens():
    return random_tokens(CONFIG, CONFIG.max_seq_len)


@pytest.fixture(scope="module")
def directions():
    """What logits and parameters are changed by, drawn at random."""
    logits_BLV = np.random.default_rng(1).standard_normal((2, 4, CONFIG.vocab_size))
    return logits_BLV, float64(random_params(CONFIG, seed=2))


@pytest.fixture(scope="module")
def ours(tokens, directions):
    """Logits, and gradients of their sum along a direction: one optimised program, as in a run."""

    def weighted_sum(params):
        logits = PerceiverAR(CONFIG).apply({"params": params}, tokens, PREFIX_LEN, PADS)
        return (logits * directions[0].astype(np.float32)).sum(), logits

    run = jax.jit(jax.value_and_grad(weighted_sum, has_aux=True))
    (_, logits), gradients = run(random_params(CONFIG))
    return logits, gradients


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_logits_of_a_long_prefix_are_those_in_float64(tokens, ours):
    params = float64(random_params(CONFIG))
    expected = float64_logits(params, CONFIG, tokens, PREFIX_LEN, PADS)
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_gradients_of_a_long_prefix_are_those_in_float64(tokens, ours, directions):
    """By central differences, for each parameter along its own random direction."""
    weights_BLV, steps = directions
    params, step_size = float64(random_params(CONFIG)), 1e-5
    paths = jax.tree_util.tree_flatten_with_path(params)[0]

    def moved(path, by):
        """The weighted sum of the logits with one parameter moved along its direction."""

        def move(other, x, step):
            return x + by * step if other == path else x

        changed = jax.tree_util.tree_map_with_path(move, params, steps)
        logits_BLV = float64_logits(changed, CONFIG, tokens, PREFIX_LEN, PADS)
        return (logits_BLV * weights_BLV).sum()

    def along(gradients, path):
        leaf = lambda tree: dict(jax.tree_util.tree_flatten_with_path(tree)[0])[path]
        return float((np.asarray(leaf(gradients), np.float64) * leaf(steps)).sum())

    expected = {
        jax.tree_util.keystr(path): (moved(path, step_size) - moved(path, -step_size))
        / (2 * step_size)
        for path, _ in paths
    }
    actual = {jax.tree_util.keystr(path): along(ours[1], path) for path, _ in paths}
    assert actual == pytest.approx(expected, rel=1e-4)
