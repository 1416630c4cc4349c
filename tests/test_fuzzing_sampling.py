"""Filters and choices on logits of any kind, held against their definitions in float64."""

import jax
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from perceiver_ar_jax.generation.sampling import (
    Greedy,
    MinP,
    RepetitionPenalty,
    Sample,
    Temperature,
    TopK,
    TopP,
)

VOCABULARY = 12
ROUNDING = 1e-5  # of sums of float32 probabilities

ties = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])
numbers = st.floats(-80, 80, width=32, allow_subnormal=False)  # XLA takes subnormal ones for 0
excluded = st.just(-np.inf)
not_numbers = st.sampled_from([np.nan, np.inf, -np.inf])
shares = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1, width=32)


def rows(*entries):
    """Logits (1, V), every one from one of these strategies."""
    row = st.lists(st.one_of(*entries), min_size=VOCABULARY, max_size=VOCABULARY)
    return row.map(lambda values: np.array([values], np.float32))


# Finite at all temperatures.
large = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
any_rows = rows(ties, large, not_numbers)


@st.composite
def usable_rows(draw):
    """Numbers, many of them equal, and some excluded tokens; not all are excluded."""
    logits_1V = draw(rows(ties, numbers, excluded))
    assume(np.isfinite(logits_1V).any())
    return logits_1V


# In the order of `Options.filters`. A new k is a compilation, so there are few.
filters = st.tuples(
    st.floats(1e-3, 1e3).map(Temperature),
    st.sampled_from([1, 3, VOCABULARY]).map(TopK),
    shares.map(TopP),
    shares.map(MinP),
)


@jax.jit
def apply(keep, logits_1V):
    return keep(logits_1V)


@jax.jit
def draw_token(filters, key, logits_1V):
    sample = Sample(filters, key)
    return sample(logits_1V, 0)[0], sample.filtered(logits_1V)


def kept_and_probabilities(keep, logits_1V):
    """Which tokens a filter keeps, (V,), and how likely each was, in float64."""
    filtered = np.asarray(apply(keep, logits_1V))[0]
    logits = logits_1V[0].astype(np.float64)
    kept = filtered > -np.inf
    np.testing.assert_array_equal(filtered[kept], logits_1V[0][kept])
    weights = np.exp(logits - logits.max())
    return kept, weights / weights.sum()


@given(usable_rows(), st.integers(1, 2 * VOCABULARY))
def test_top_k_keeps_the_k_largest_and_their_equals(logits_1V, k):
    kept, _ = kept_and_probabilities(TopK(k), logits_1V)
    least = np.sort(logits_1V[0])[-min(k, VOCABULARY)]
    np.testing.assert_array_equal(kept, (logits_1V[0] >= least) & np.isfinite(logits_1V[0]))


@given(usable_rows(), shares)
def test_top_p_keeps_the_fewest_likeliest_that_hold_the_share(logits_1V, p):
    kept, probs = kept_and_probabilities(TopP(p), logits_1V)
    assert kept.any()
    assert probs[kept].min() >= probs[~kept].max(initial=0.0)
    assert probs[kept].sum() >= p - ROUNDING
    without_least = probs[kept].sum() - probs[kept].min()
    assert without_least <= p + ROUNDING or kept.sum() == 1


@given(usable_rows(), shares)
def test_min_p_keeps_what_has_that_share_of_the_likeliest(logits_1V, p):
    kept, probs = kept_and_probabilities(MinP(p), logits_1V)
    relative = probs / probs.max()
    assert kept[relative > p + ROUNDING].all()
    assert not kept[relative < p - ROUNDING].any()
    assert kept[probs.argmax()]


@given(usable_rows(), st.floats(1e-3, 1e3))
def test_temperature_and_greedy_choice_keep_the_order(logits_1V, temperature):
    scaled_1V = np.asarray(apply(Temperature(temperature), logits_1V))
    ascending = scaled_1V[0, np.argsort(logits_1V[0])]
    assert (ascending[1:] >= ascending[:-1]).all()
    assert Greedy()(logits_1V, 0)[0] == logits_1V[0].argmax()


@given(usable_rows(), st.lists(st.booleans(), min_size=VOCABULARY, max_size=VOCABULARY))
def test_a_repetition_penalty_lowers_the_tokens_seen_and_no_others(logits_1V, seen):
    seen_1V = np.array([seen])
    lower_1V = np.asarray(RepetitionPenalty(1.5)(logits_1V, seen_1V))
    np.testing.assert_array_equal(lower_1V[~seen_1V], logits_1V[~seen_1V])
    assert (lower_1V[seen_1V] <= logits_1V[seen_1V]).all()


@given(usable_rows(), filters, st.integers(0, 2**32 - 1))
def test_a_token_that_is_drawn_was_kept_by_all_filters(logits_1V, chosen, seed):
    token, filtered_1V = draw_token(chosen, jax.random.key(seed), logits_1V)
    assert filtered_1V[0, token] > -np.inf
    assert logits_1V[0, token] > -np.inf


@given(any_rows, filters, st.integers(0, 2**32 - 1))
def test_logits_of_any_kind_give_an_id_of_the_vocabulary(logits_1V, chosen, seed):
    token, _ = draw_token(chosen, jax.random.key(seed), logits_1V)
    greedy = Greedy()(logits_1V, 0)[0]
    assert 0 <= token < VOCABULARY and 0 <= greedy < VOCABULARY
    if np.isnan(logits_1V).any():
        return
    if np.isposinf(logits_1V).any():
        assert np.isposinf(logits_1V[0, [token, greedy]]).all()
    if np.isneginf(logits_1V).all():
        assert token == greedy == 0
