"""What surrounds cuDNN's kernel, on CPU, where `jax.nn` computes the same by einsums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import left_pads, quick_jit
from test_model_attention import assert_close, weighted_sum_of

from perceiver_ar_jax.model.attention import Visibility, cudnn, merge, recompute

LATENTS, PREFIX = 4, 3
PADS = {
    "none": None,
    "in the prefix": left_pads([0, 2], PREFIX + LATENTS),
    "in the latents": left_pads([5, 3], PREFIX + LATENTS),
}


def example():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, LATENTS, 2, 8), (2, PREFIX + LATENTS, 2, 8), (2, PREFIX + LATENTS, 2, 8)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def both_parts(attend, pads_BK):
    def run(q, k, v):
        parts = []
        for columns, causal in ((slice(PREFIX), False), (slice(PREFIX, None), True)):
            pads = None if pads_BK is None else pads_BK[:, columns]
            visible = Visibility(pads, causal=causal)
            parts.append(attend(q, k[:, columns], v[:, columns], visible))
        out, lse = merge(parts)
        return out, jnp.where(lse > -1e30, lse, 0)  # of queries that see no key: a low number

    return run


@pytest.mark.parametrize("pads_BK", PADS.values(), ids=PADS)
def test_merged_parts_and_their_gradients_are_those_of_the_einsum(pads_BK):
    def results(attend):
        run = both_parts(attend, pads_BK)
        return run(*example()), *jax.grad(weighted_sum_of(run), (0, 1, 2))(*example())

    ours, expected = (quick_jit(lambda run=x.attend: results(run))() for x in (cudnn, recompute))
    assert_close(ours, expected, atol=3e-6)


def test_a_log_sum_exp_that_nothing_reads_costs_no_second_attention():
    def loss(q, k, v, number):
        results = cudnn.attend(q, k, v, Visibility())[:number]
        return sum(x.sum() for x in results)

    def exponentials(number):
        gradient = jax.grad(lambda *x: loss(*x, number), (0, 1, 2))
        return str(jax.make_jaxpr(gradient)(*example())).count(" exp ")

    assert exponentials(1) < exponentials(2)


def test_documents_are_refused():
    q, k, v = example()
    ids = np.zeros((2, LATENTS), int), np.zeros((2, PREFIX + LATENTS), int)
    with pytest.raises(ValueError, match="does not separate documents; use `recompute`"):
        cudnn.attend(q, k, v, Visibility(None, *ids))
