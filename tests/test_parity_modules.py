import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close_to_reference, our_model, random_config, reference_model, torch
from small_models import left_pads, quick_jit

from perceiver_ar_jax.conversion.perceiver_io import rotary_channel_order
from perceiver_ar_jax.model.attention import Visibility, merge
from perceiver_ar_jax.model.cache import KeysValues
from perceiver_ar_jax.model.layers import (
    MLP,
    CrossAttentionLayer,
    Embedding,
    LayerNorm,
    MultiHeadAttention,
    SelfAttentionLayer,
)
from perceiver_ar_jax.model.positions import Rotation, positions, rotate, rotation

with torch.no_grad():
    from perceiver.model.core import position as reference_position

PREFIX, LATENTS = 5, 4
PADS = left_pads([0, 3], PREFIX + LATENTS)
VISIBLE_PREFIX = Visibility(PADS[:, :PREFIX])
VISIBLE_LATENTS = Visibility(PADS[:, PREFIX:], causal=True)
CONFIGS = {
    "absolute positions": random_config(
        0, num_channels=32, num_heads=2, num_self_attention_layers=1, abs_pos_emb=True,
        max_seq_len=16, max_latents=8, max_heads_parallel=1,
    ),
    "rotary positions alone": random_config(
        0, num_channels=32, num_heads=4, num_self_attention_layers=1, abs_pos_emb=False,
        max_seq_len=16, max_latents=8, max_heads_parallel=None,
    ),
}  # fmt: skip


class Pair:
    """The two models, positions of two rows, and what their modules give."""

    def __init__(self, config):
        self.config = config
        self.reference = reference_model(config, 0)
        _, self.params = our_model(self.reference, config)
        positions_BS = positions(PREFIX + LATENTS, PADS)
        self.rotation = rotation(positions_BS, config)
        self.rotation_of_prefix = Rotation(*(x[:, :PREFIX] for x in self.rotation))
        self.rotation_of_latents = Rotation(*(x[:, PREFIX:] for x in self.rotation))
        angles = self.reference.input_adapter.frq_pos_encoding(
            torch.tensor(np.asarray(positions_BS))
        )
        self.angles = angles
        turning = reference_position.RotaryPositionEmbedding
        self.turning = turning(angles, right_align=True)
        self.turning_of_latents = turning(angles[:, PREFIX:], right_align=True)

    def assert_same(self, module, path, run, expected):
        """`run`, given our module with the parameters at `path`, computes what is expected."""
        params = self.params
        for name in path.split("/"):
            params = params[name]
        actual = quick_jit(lambda params: run(module.bind({"params": params})))(params)
        assert_close_to_reference(actual, expected.detach(), 2e-6)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    return Pair(CONFIGS[request.param])


def activations(length, seed=0):
    return np.random.default_rng(seed).standard_normal((2, length, 32)).astype(np.float32)


def test_positions(pair):
    shift = torch.tensor(PADS).sum(1, keepdim=True)
    expected = reference_position.positions(2, PREFIX + LATENTS, shift=shift)
    np.testing.assert_array_equal(positions(PREFIX + LATENTS, PADS), expected)


def test_rotary_angles(pair):
    each_pair_once = pair.angles[..., ::2]
    assert_close_to_reference(pair.rotation.cos, each_pair_once.cos(), 1e-6)
    assert_close_to_reference(pair.rotation.sin, each_pair_once.sin(), 1e-6)


def test_rotation(pair):
    heads, width = pair.config.num_heads, pair.config.head_dim
    x_BSNH = activations(PREFIX + LATENTS).reshape(2, -1, heads, width)
    expected = pair.turning.rotate(torch.tensor(x_BSNH).transpose(1, 2)).transpose(1, 2)
    order = rotary_channel_order(pair.config)[:width]
    actual = rotate(jnp.asarray(x_BSNH[..., order]), pair.rotation)
    assert_close_to_reference(actual, expected[..., order], 1e-6)


def test_layer_norm(pair):
    x = 3 + 2 * activations(LATENTS)
    expected = pair.reference.cross_attention[0].module.q_norm(torch.tensor(x))
    pair.assert_same(
        LayerNorm(pair.config), "cross_attention/q_norm", lambda norm: norm(x), expected
    )


def test_token_embedding(pair):
    tokens = np.array([[3, 0, 9], [1, 1, 4]])
    expected = pair.reference.input_adapter.txt_embedding(torch.tensor(tokens))
    module = Embedding(pair.config.vocab_size, pair.config)
    pair.assert_same(module, "token_embedding", lambda table: table(tokens), expected)


def test_attention(pair):
    x_q, x_kv = activations(LATENTS), activations(PREFIX + LATENTS, seed=1)
    expected = pair.reference.cross_attention[0].module.attention(
        torch.tensor(x_q),
        torch.tensor(x_kv),
        pad_mask=torch.tensor(PADS),
        rot_pos_emb_q=pair.turning_of_latents,
        rot_pos_emb_k=pair.turning,
    )

    def run(attention):
        q = attention.queries(x_q, pair.rotation_of_latents)
        kv = attention.keys_values(x_kv, pair.rotation)
        prefix = KeysValues(kv.k[:, :PREFIX], kv.v[:, :PREFIX]), VISIBLE_PREFIX
        latents = KeysValues(kv.k[:, PREFIX:], kv.v[:, PREFIX:]), VISIBLE_LATENTS
        parts = [attention.attend(q, *part, deterministic=True) for part in (prefix, latents)]
        return attention.project(merge(parts)[0])

    module = MultiHeadAttention(pair.config, pair.config.max_heads_parallel, out_bias=True)
    pair.assert_same(module, "cross_attention/attention", run, expected.last_hidden_state)


def test_cross_attention_layer(pair):
    latents, prefix = activations(LATENTS), activations(PREFIX, seed=1)
    expected = pair.reference.cross_attention(
        torch.tensor(latents),
        x_kv_prefix=torch.tensor(prefix),
        pad_mask=torch.tensor(PADS),
        rot_pos_emb_q=pair.turning_of_latents,
        rot_pos_emb_k=pair.turning,
    )

    def run(layer):
        kv = layer.prefix_keys_values(prefix, pair.rotation_of_prefix)
        attend_prefix = lambda q: layer.attention.attend(q, kv, VISIBLE_PREFIX, deterministic=True)
        return layer(latents, pair.rotation_of_latents, VISIBLE_LATENTS, attend_prefix)[0]

    module = CrossAttentionLayer(pair.config)
    pair.assert_same(module, "cross_attention", run, expected.last_hidden_state)


@pytest.mark.parametrize("rotates", [True, False])
def test_self_attention_layer(pair, rotates):
    latents = activations(LATENTS)
    expected = pair.reference.self_attention[0](
        torch.tensor(latents), rot_pos_emb=pair.turning_of_latents if rotates else None
    )

    def run(layer):
        turned = pair.rotation_of_latents if rotates else None
        return layer(latents, turned, Visibility(causal=True))[0]

    module = SelfAttentionLayer(pair.config)
    pair.assert_same(module, "self_attention_0", run, expected.last_hidden_state)


def test_mlp(pair):
    x = activations(LATENTS)
    for path, theirs, factor in (
        (
            "cross_attention/mlp",
            pair.reference.cross_attention[1].module,
            pair.config.cross_attention_widening_factor,
        ),
        (
            "self_attention_0/mlp",
            pair.reference.self_attention[0][1].module,
            pair.config.self_attention_widening_factor,
        ),
    ):
        expected = theirs(torch.tensor(x)).last_hidden_state
        pair.assert_same(MLP(factor, pair.config), path, lambda mlp: mlp(x), expected)
