import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import import_reference

from perceiver_ar_jax.generation.options import Options
from perceiver_ar_jax.generation.sampling import (
    Greedy,
    MinP,
    RepetitionPenalty,
    Sample,
    Temperature,
    TopK,
    TopP,
)

torch = import_reference("torch")
warpers = import_reference("transformers.generation.logits_process")

PAIRS = {
    "temperature": lambda x: (Temperature(x), warpers.TemperatureLogitsWarper(x)),
    "top_k": lambda x: (TopK(x), warpers.TopKLogitsWarper(x)),
    "top_p": lambda x: (TopP(x), warpers.TopPLogitsWarper(x)),
    "min_p": lambda x: (MinP(x), warpers.MinPLogitsWarper(x)),
}


def random_logits(tied: bool):
    logits = np.random.default_rng(0).normal(scale=3.0, size=(20, 40)).astype(np.float32)
    return np.round(logits) if tied else logits


def probabilities_of_transformers(names_and_values, logits):
    scores = torch.tensor(logits)
    for name, value in names_and_values:
        scores = PAIRS[name](value)[1](None, scores)
    return scores.softmax(-1).numpy()


def assert_same_distribution(actual, expected, tied):
    if tied:  # which of equally likely tokens torch's sort puts first is undefined
        actual, expected = np.sort(actual), np.sort(expected)
    np.testing.assert_array_equal(actual > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", x) for x in (0.3, 1.7)),
        *(("top_k", x) for x in (1, 2, 7, 40, 100)),
        *(("top_p", x) for x in (0.0, 0.1, 0.5, 0.9, 0.999)),
        *(("min_p", x) for x in (0.0, 0.05, 0.5, 1.0)),
    ],
)
def test_each_filter_keeps_what_transformers_keeps(name, value, tied):
    logits = random_logits(tied)
    actual = jax.nn.softmax(PAIRS[name](value)[0](logits))
    assert_same_distribution(actual, probabilities_of_transformers([(name, value)], logits), tied)


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_filters_apply_in_the_order_of_transformers(tied):
    chosen = {"min_p": 0.02, "top_p": 0.8, "top_k": 12, "temperature": 1.5}
    options = Options(**chosen, do_sample=True, rng=jax.random.key(0))
    sample = Sample(options.filters, options.rng)
    actual = jax.nn.softmax(sample.filtered(random_logits(tied)))
    order = ["temperature", "top_k", "top_p", "min_p"]
    pairs = [(name, chosen[name]) for name in order]
    expected = probabilities_of_transformers(pairs, random_logits(tied))
    assert_same_distribution(actual, expected, tied)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits = random_logits(tied=False)
    tokens = np.random.default_rng(1).integers(0, 40, (20, 9))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    expected = warpers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(tokens), torch.tensor(logits)
    )
    np.testing.assert_allclose(RepetitionPenalty(penalty)(logits, seen), expected, rtol=1e-6)


def test_samples_follow_the_filtered_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    sample = Sample((TopK(3),), jax.random.key(0))
    draws = jax.vmap(lambda count: sample(logits, count)[0])(jnp.arange(20_000))
    shares = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_allclose(shares, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0], atol=0.015)


def test_greedy_takes_the_first_of_equally_likely_tokens():
    assert Greedy()(jnp.array([[0.0, 2.0, 2.0]]), jnp.int32(0)) == 1


def test_filters_are_hashable_values():
    assert hash(TopP(0.5)) == hash(TopP(0.5))
    assert TopK(3) == TopK(3) != TopK(4)
