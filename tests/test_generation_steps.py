"""What `Generation` tells of each step: log-probabilities, alternatives, attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.generation import Generation, Options, generate_with_log_probs
from perceiver_ar_jax.model.positions import rotation

CONFIG = small_config()
MODEL, PARAMS = PerceiverAR(CONFIG), random_params(CONFIG)
TOKENS_BS = random_tokens(CONFIG, 12)
PADS_BS = left_pads([0, 3], 12)


def attention_by_definition(module, tokens_BS, pads_BS, prefix_len, columns):
    """What the last of all positions reads of the newest `columns`, (B, N, K)."""
    layer = module.cross_attention
    positions_BS = jnp.arange(tokens_BS.shape[1]) - pads_BS.sum(1)[:, None]
    x_BSD = module.token_embedding(tokens_BS)
    if CONFIG.abs_pos_emb:
        last = CONFIG.max_seq_len - 1
        x_BSD += module.position_embedding(jnp.clip(positions_BS, 0, last))
    normed_BSD = jnp.concatenate(
        [layer.kv_norm(x_BSD[:, :prefix_len]), layer.q_norm(x_BSD[:, prefix_len:])], axis=1
    )
    rotation_BS = rotation(positions_BS, CONFIG)
    q_BSNH = layer.attention.queries(normed_BSD, rotation_BS)
    k_BSNH = layer.attention.keys_values(normed_BSD, rotation_BS).k
    scores_BNS = jnp.einsum("BNH,BSNH->BNS", q_BSNH[:, -1], k_BSNH)
    scores_BNS = jnp.where(pads_BS[:, None], -jnp.inf, scores_BNS)
    return jax.nn.softmax(scores_BNS[..., -columns:])


@pytest.mark.parametrize(("steps", "columns"), [(0, 12), (3, 10)])
def test_attention_to_a_cache_is_that_of_a_pass_over_the_text(steps, columns):
    """The last case has fewer columns than the text, so that the cache slides."""
    read = 12 - steps

    @quick_jit
    def weights(params):
        apply = functools.partial(MODEL.apply, {"params": params})
        _, cache = apply(TOKENS_BS[:, :read], 6, PADS_BS[:, :read], method="prefill")
        cache = cache.with_room(columns=columns, latents=6)
        for column in range(read, 12):
            _, cache = apply(TOKENS_BS[:, column], cache, method="decode_step")
        definition = functools.partial(attention_by_definition, prefix_len=6, columns=columns)
        return (
            apply(TOKENS_BS[:, -1], cache, method="newest_attention"),
            apply(TOKENS_BS, PADS_BS, method=definition),
        )

    of_cache_BNK, expected_BNK = weights(PARAMS)
    np.testing.assert_allclose(of_cache_BNK, expected_BNK, atol=1e-6)


@pytest.fixture(scope="module")
def steps():
    """Of a greedy continuation, with three alternatives, and what the last of them read."""
    options = Options.of(max_new_tokens=5, num_alternatives=3)
    generation = Generation(MODEL, PARAMS, TOKENS_BS, options, num_latents=4)
    steps = [(step, generation.newest_attention()) for step in generation.steps()]
    return steps


def test_steps_are_the_tokens_of_generate_and_their_likeliest_alternatives(steps):
    tokens_BS, log_probs_BT = generate_with_log_probs(
        MODEL, PARAMS, TOKENS_BS, num_latents=4, max_new_tokens=5
    )
    for place, (step, _) in enumerate(steps):
        np.testing.assert_array_equal(step.tokens_B, tokens_BS[:, 12 + place])
        np.testing.assert_allclose(step.log_probs_B, log_probs_BT[:, place], rtol=1e-5)
        np.testing.assert_array_equal(step.alternative_ids_BA[:, 0], step.tokens_B)
    logits_BLV = quick_jit(lambda params: MODEL.apply({"params": params}, TOKENS_BS, 8))(PARAMS)
    log_probs_BV = jax.nn.log_softmax(logits_BLV[:, -1])
    likeliest_BA = np.sort(log_probs_BV)[:, ::-1][:, :3]
    first = steps[0][0]
    np.testing.assert_allclose(first.alternative_log_probs_BA, likeliest_BA, rtol=1e-4)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(log_probs_BV), first.alternative_ids_BA, 1),
        likeliest_BA,
        rtol=1e-4,
    )


def test_the_first_step_read_what_the_end_of_the_prompt_reads(steps):
    definition = functools.partial(
        attention_by_definition, pads_BS=PADS_BS & False, prefix_len=8, columns=12
    )
    expected_BNK = quick_jit(
        lambda params: MODEL.apply({"params": params}, TOKENS_BS, method=definition)
    )(PARAMS)
    for step, (_, attention_BK) in enumerate(steps):
        np.testing.assert_allclose(attention_BK.sum(axis=1), 1, rtol=1e-5)
        assert np.count_nonzero(attention_BK[0]) == min(12 + step, CONFIG.max_seq_len)
    _, first_BK = steps[0]
    np.testing.assert_allclose(first_BK[:, -12:], expected_BNK.mean(axis=1), atol=1e-6)


def test_alternatives_are_kept_token_by_token_only():
    with pytest.raises(ValueError, match="num_alternatives goes with greedy choice and sampling"):
        Options.of(num_alternatives=2, num_beams=2)
    with pytest.raises(ValueError, match="must not be negative"):
        Options.of(num_alternatives=-1)
    with pytest.raises(ValueError, match="there are only 48 token ids"):
        Generation(MODEL, PARAMS, TOKENS_BS, Options.of(num_alternatives=49), num_latents=4)
