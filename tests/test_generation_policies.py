"""Each decoding policy against an oracle that keeps no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig, generate
from perceiver_ar_jax.generation.policies import Recompute, Reset
from perceiver_ar_jax.generation.prompt_lookup import PromptLookup
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.model.attention import Visibility
from perceiver_ar_jax.model.positions import Rotation, rotation

NEW_TOKENS = 40


@functools.cache
def small_model(abs_pos_emb: bool, layers: int = 2):
    config = PerceiverARConfig(
        vocab_size=60,
        max_seq_len=17,
        max_latents=5,
        num_channels=16,
        num_heads=2,
        num_self_attention_layers=layers,
        num_self_attention_rotary_layers=-1,
        abs_pos_emb=abs_pos_emb,
        output_norm=True,
        init_scale=0.4,
    )
    model = PerceiverAR(config)
    return model, jax.jit(init_params, static_argnums=0)(model, jax.random.key(3))


@functools.partial(jax.jit, static_argnames=("model", "latents"))
def next_token(params, tokens, pad_mask, *, model, latents):
    prefix_len = tokens.shape[1] - latents
    return model.apply({"params": params}, tokens, prefix_len, pad_mask)[0, -1].argmax()


@functools.cache
def full_passes(abs_pos_emb, prompt, num_latents, refill, layers=2):
    """Greedy continuation by a full pass per token; `refill` latents when they are used up."""
    model, params = small_model(abs_pos_emb, layers)
    config = model.config

    tokens, latents = list(prompt), num_latents
    prefix_len = len(tokens) - latents
    for _ in range(NEW_TOKENS):
        pads = config.max_prefix_len - prefix_len  # so that few shapes are compiled
        context = np.array([[0] * pads + tokens[-(prefix_len + latents) :]])
        pad_mask = np.arange(context.shape[1])[None] < pads
        tokens.append(int(next_token(params, context, pad_mask, model=model, latents=latents)))
        latents += 1
        if latents > config.max_latents:
            latents, prefix_len = refill, min(len(tokens) - refill, config.max_prefix_len)
    return tokens


@pytest.fixture(params=[None, 1, 3], ids=["plain", "lookup 1", "lookup 3"])
def lookup(request, monkeypatch):
    """Options with and without prompt lookup, which guesses at every token that occurred before."""
    eager = functools.partial(PromptLookup, threshold=1e-6)
    monkeypatch.setattr("perceiver_ar_jax.generation.options.PromptLookup", eager)
    return {"prompt_lookup_num_tokens": request.param}


PROMPTS = [[7, 8], [3, 1, 4, 1, 5, 9], [*range(20, 34)]]


@pytest.mark.parametrize("abs_pos_emb", [False, True], ids=["rotary", "absolute"])
@pytest.mark.parametrize(("policy", "refill"), [("recompute", 5), ("reset", 2), (Reset(4), 4)])
def test_a_policy_of_full_passes_gives_what_they_give(policy, refill, abs_pos_emb, lookup):
    model, params = small_model(abs_pos_emb)
    options = {"num_latents": 2, "max_new_tokens": NEW_TOKENS, "policy": policy}
    together = generate(model, params, PROMPTS, **options, **lookup)
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        expected = full_passes(abs_pos_emb, tuple(prompt), 2, refill)
        np.testing.assert_array_equal(tokens[-NEW_TOKENS:], expected[-NEW_TOKENS:])
    alone = generate(model, params, [PROMPTS[1]], **options, **lookup)
    np.testing.assert_array_equal(alone[0], full_passes(abs_pos_emb, tuple(PROMPTS[1]), 2, refill))


@struct.dataclass
class Window(Visibility):
    """Any mask at all."""

    mask_LK: jax.Array = None

    def mask(self, num_queries, num_keys):
        return self.mask_LK[None]


def logits_of_sliding_windows(model, tokens_1S, prefix_len):
    """One pass in which every position after the prefix is a latent that sees a sliding window.

    The newest max_latents positions in the self-attention, max_seq_len in the cross-attention.
    """
    config = model.config
    positions_1S = jnp.arange(tokens_1S.shape[1])[None]
    rotation_1S = rotation(positions_1S, config)
    rotation_1L = Rotation(*(x[:, prefix_len:] for x in rotation_1S))
    distances_SS = positions_1S.T - positions_1S
    cross_mask = (distances_SS >= 0) & (distances_SS < config.max_seq_len)
    self_mask = (distances_SS >= 0) & (distances_SS < config.max_latents)
    x_1SD = model.token_embedding(tokens_1S)
    if config.abs_pos_emb:
        x_1SD += model.position_embedding(jnp.minimum(positions_1S, config.max_seq_len - 1))
    rotation_1P = Rotation(*(x[:, :prefix_len] for x in rotation_1S))
    layer = model.cross_attention
    kv = layer.prefix_keys_values(x_1SD[:, :prefix_len], rotation_1P)
    visible_prefix = Window(mask_LK=cross_mask[prefix_len:, :prefix_len])
    x_1LD, _ = layer(
        x_1SD[:, prefix_len:],
        rotation_1L,
        Window(mask_LK=cross_mask[prefix_len:, prefix_len:]),
        lambda q: layer.attention.attend(q, kv, visible_prefix, deterministic=True),
    )
    for layer in model.self_attention:
        x_1LD, _ = layer(x_1LD, rotation_1L, Window(mask_LK=self_mask[prefix_len:, prefix_len:]))
    return model.logits(model.out_norm(x_1LD))


@pytest.mark.parametrize("abs_pos_emb", [False, True], ids=["rotary", "absolute"])
def test_slide_is_one_pass_with_sliding_windows(abs_pos_emb, lookup):
    model, params = small_model(abs_pos_emb)
    prompt = PROMPTS[1]
    tokens = generate(model, params, [prompt], num_latents=2, max_new_tokens=NEW_TOKENS, **lookup)
    logits = jax.jit(
        lambda tokens: model.apply(
            {"params": params}, tokens, len(prompt) - 2, method=logits_of_sliding_windows
        )
    )(tokens)
    np.testing.assert_array_equal(logits[0, 1:-1].argmax(axis=1), tokens[0, len(prompt) :])


def test_policies_agree_until_the_latents_are_used_up_and_then_differ():
    model, params = small_model(abs_pos_emb=False)
    texts = {
        policy: generate(
            model, params, [PROMPTS[2]], num_latents=2, max_new_tokens=NEW_TOKENS, policy=policy
        )[0, len(PROMPTS[2]) :]
        for policy in ("slide", "recompute", "reset")
    }
    same = 1 + model.config.max_latents - 2  # the prompt's next token, then 3 more latents
    for text in texts.values():
        np.testing.assert_array_equal(text[:same], texts["slide"][:same])
    assert len({tuple(text) for text in texts.values()}) == 3


def test_reset_without_self_attention_layers():
    model, params = small_model(abs_pos_emb=False, layers=0)
    tokens = generate(
        model, params, [PROMPTS[1]], num_latents=2, max_new_tokens=NEW_TOKENS, policy="reset"
    )
    expected = full_passes(False, tuple(PROMPTS[1]), 2, refill=2, layers=0)
    np.testing.assert_array_equal(tokens[0], expected)


def test_refill_is_checked_against_the_model():
    model, params = small_model(abs_pos_emb=False)
    with pytest.raises(ValueError, match=r"refill=6 out of valid range \[1..5\]"):
        generate(model, params, [[1]], policy=Reset(refill=6))


def test_default_refill_leaves_room_for_128_tokens():
    clm, small = PerceiverARConfig.clm_base(), PerceiverARConfig(max_latents=100)
    assert Reset().latents_after(clm) == 512 - 128
    assert Reset().latents_after(small) == 50
    assert Recompute().latents_after(clm) == 512
