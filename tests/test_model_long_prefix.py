"""More than 32,768 rows of prefix against float64.

On CPU, jax 0.10.2 compiles `jit(vmap(lambda row: jnp.sum((M @ row) ** 2)))`, M small, to a
program that is silently wrong from 32,769 float32 rows up (jax issue 39103, fixed in 0.11). The
model has no such sum today; a formulation that brings one fails here.
"""

import jax
import numpy as np
import pytest
from float64_model import float64_logits
from quick_compilation import USUAL_OPTIONS
from small_models import left_pads, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.model.attention.dispatch import FUSED, IMPLEMENTATIONS

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


VARIANTS = [{"attention": name} for name in IMPLEMENTATIONS if name not in FUSED]
VARIANTS += [{"prefix_chunk": 1024}]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def ours(request, tokens, directions):
    """Logits, and gradients of their weighted sum: one optimised program, as in a run."""
    model = PerceiverAR(CONFIG.replace(**request.param))

    def weighted_sum(params):
        logits = model.apply({"params": params}, tokens, PREFIX_LEN, PADS)
        return (logits * directions[0].astype(np.float32)).sum(), logits

    run = jax.jit(jax.value_and_grad(weighted_sum, has_aux=True), compiler_options=USUAL_OPTIONS)
    (_, logits), gradients = run(random_params(CONFIG))
    return logits, gradients


@pytest.fixture(scope="module")
def derivatives(tokens, directions):
    """By central differences, of the weighted sum, for each parameter along its own direction."""
    weights_BLV, steps = directions
    params, step_size = float64(random_params(CONFIG)), 1e-5

    def moved(path, by):
        def move(other, x, step):
            return x + by * step if other == path else x

        changed = jax.tree_util.tree_map_with_path(move, params, steps)
        logits_BLV = float64_logits(changed, CONFIG, tokens, PREFIX_LEN, PADS)
        return (logits_BLV * weights_BLV).sum()

    return {
        jax.tree_util.keystr(path): (moved(path, step_size) - moved(path, -step_size))
        / (2 * step_size)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_logits_of_a_long_prefix_are_those_in_float64(tokens, ours):
    params = float64(random_params(CONFIG))
    expected = float64_logits(params, CONFIG, tokens, PREFIX_LEN, PADS)
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_gradients_of_a_long_prefix_are_those_in_float64(ours, directions, derivatives):
    along = jax.tree.map(lambda x, step: float((x * step).sum()), float64(ours[1]), directions[1])
    leaves = jax.tree_util.tree_leaves_with_path(along)
    actual = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    assert actual == pytest.approx(derivatives, rel=1e-4)
