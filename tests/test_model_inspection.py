"""Hidden states and attention maps: those of perceiver-io, and of the other calls of the model."""

import functools

import numpy as np
import pytest
from small_models import left_pads, quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR

TOKENS_BS = random_tokens(small_config(), 12)
PADS_BS = left_pads([0, 3], 12)


def look(config, params, *args, method, **kwargs):
    """The result of a method of the model, as numpy arrays."""
    run = functools.partial(PerceiverAR(config).apply, method=method)
    results = quick_jit(lambda params: run({"params": params}, *args, **kwargs))(params)
    return [np.asarray(x) for x in results]


@pytest.mark.parametrize("prefix_chunk", [0, 4])
def test_the_last_hidden_state_is_what_the_head_reads(prefix_chunk):
    config = small_config(output_norm=False, prefix_chunk=prefix_chunk)
    params = random_params(config)
    states = look(config, params, TOKENS_BS, 7, PADS_BS, method="hidden_states")
    hidden_BLD = look(config, params, TOKENS_BS, 7, PADS_BS, method="hidden")
    assert [x.shape for x in states] == [(2, 5, 16)] * 4
    np.testing.assert_allclose(states[-1], hidden_BLD, atol=1e-5)


def test_each_latent_reads_all_of_what_it_sees_and_nothing_else():
    config = small_config()
    cross_BNLS, *layers = look(
        config, random_params(config), TOKENS_BS, 7, PADS_BS, method="attention_maps"
    )
    assert cross_BNLS.shape == (2, 2, 5, 12)
    assert [x.shape for x in layers] == [(2, 2, 5, 5)] * 2
    causal_LL = np.tri(5, dtype=bool)
    sees_prefix_BLP = np.broadcast_to(~PADS_BS[:, None, :7], (2, 5, 7))
    visible_BLS = np.concatenate([sees_prefix_BLP, np.broadcast_to(causal_LL, (2, 5, 5))], axis=2)
    for map_BNLK, visible in [
        (cross_BNLS, visible_BLS[:, None]),
        *((x, causal_LL) for x in layers),
    ]:
        np.testing.assert_allclose(map_BNLK.sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(map_BNLK > 0, np.broadcast_to(visible, map_BNLK.shape))


def test_documents_do_not_read_each_other():
    config = small_config()
    segment_ids_BS = np.broadcast_to(np.arange(12) // 8, (2, 12))
    maps = look(
        config,
        random_params(config),
        TOKENS_BS,
        7,
        segment_ids=segment_ids_BS,
        method="attention_maps",
    )
    same_LS = segment_ids_BS[0, 7:, None] == segment_ids_BS[0]
    assert not maps[0][:, :, ~same_LS].any()
    assert not maps[1][:, :, ~same_LS[:, 7:]].any()


def test_the_last_row_of_the_first_map_is_what_the_newest_token_of_a_cache_reads():
    config = small_config()
    model, params = PerceiverAR(config), random_params(config)

    @quick_jit
    def of_cache(params):
        apply = functools.partial(model.apply, {"params": params})
        _, cache = apply(TOKENS_BS, 7, PADS_BS, method="prefill")
        return apply(TOKENS_BS[:, -1], cache, method="newest_attention")

    maps = look(config, params, TOKENS_BS, 7, PADS_BS, method="attention_maps")
    np.testing.assert_allclose(maps[0][:, :, -1], of_cache(params), atol=1e-6)


def test_latents_that_are_pads_and_see_nothing_read_nothing():
    config = small_config()
    pads_BS = left_pads([0, 9], 12)
    maps = look(config, random_params(config), TOKENS_BS, 7, pads_BS, method="attention_maps")
    for map_BNLK in maps:
        assert not map_BNLK[1, :, :2].any()
        np.testing.assert_allclose(map_BNLK[1, :, 2:].sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hidden_states_and_attention_maps_are_those_of_perceiver_io(seed):
    reference = pytest.importorskip("reference")
    torch = reference.torch
    config = reference.random_config(
        seed,
        max_heads_parallel=None,
        num_self_attention_layers=2,
        max_latents=7,
        max_seq_len=17,
    )
    theirs = reference.reference_model(config, seed)
    model, params = reference.our_model(theirs, config)
    tokens_BS, prefix_len, pads_BS = reference.random_input(config, seed)
    states, maps = [], []
    layers = [theirs.cross_attention, *theirs.self_attention]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: states.append(out.last_hidden_state))
    for module in theirs.modules():
        if type(module).__name__ == "MultiHeadAttention":
            module.dropout.register_forward_hook(lambda _, __, weights: maps.append(weights))
    with torch.no_grad():
        reference.reference_logits(theirs, tokens_BS, prefix_len, pads_BS)
    inputs = model.config, params, tokens_BS, prefix_len, pads_BS
    for ours, expected in (
        (look(*inputs, method="hidden_states")[1:], states),
        (look(*inputs, method="attention_maps"), maps),
    ):
        assert len(ours) == len(expected) == len(layers)
        for actual, of_reference in zip(ours, expected, strict=True):
            reference.assert_close_to_reference(actual, of_reference, 2e-5)
