"""The building blocks: Dense, LayerNorm, MLP and the two kinds of decoder layer."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model.attention import (
    Attention,
    Dropout,
    Visibility,
    attend,
    attention_weights,
    merge,
)
from perceiver_ar_jax.model.cache import KeysValues, LayerCache
from perceiver_ar_jax.model.decoding_params import DecodingKernel
from perceiver_ar_jax.model.positions import Rotation, rotate
from perceiver_ar_jax.model.products import product
from perceiver_ar_jax.parallel import constrain


class Embedding(nn.Module):
    """A table of vectors, (rows, D); gives them in float32, as the residual stream stays."""

    rows: int
    config: PerceiverARConfig

    def setup(self):
        config = self.config
        init = nn.initializers.normal(config.init_scale)
        shape = (self.rows, config.num_channels)
        self.embedding = self.param("embedding", init, shape, jnp.dtype(config.param_dtype))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """Rows of the table, (..., D)."""
        return _look_up(self.embedding, indices)

    def products(self, x: jax.Array) -> jax.Array:
        """The product of (..., D) with each row, (..., rows) in float32."""
        if isinstance(self.embedding, DecodingKernel):
            return self.embedding(x)
        dtype = self.config.dtype
        return DecodingKernel(self.embedding.astype(dtype))(x)


def embed(
    tables: tuple[jax.Array | DecodingKernel, ...], tokens_BS: jax.Array, positions_BS: jax.Array
) -> jax.Array:
    """What the first layer reads, (B, S, D).

    Args:
      tables: of `Embedding`: of tokens, and of positions if they are embedded.
      tokens_BS: token ids.
      positions_BS: positions, (1, S) where all rows have the same.
    """
    x_BSD = _look_up(tables[0], tokens_BS)
    if len(tables) > 1:
        # While decoding, positions run on past the table; the reference stays at its end.
        x_BSD += _look_up(tables[1], jnp.minimum(positions_BS, len(tables[1]) - 1))
    return constrain(x_BSD, "batch", "keys", None)


def _look_up(table, indices):
    if isinstance(table, DecodingKernel):
        return table.take(indices)
    # Keep the feature dimension unsharded; otherwise every device looks up the whole batch.
    return constrain(jnp.asarray(table), "vocab", None)[indices].astype(jnp.float32)


class Dense(nn.Module):
    """A linear map in the config's dtype; its kernel is (in, out)."""

    features: int
    config: PerceiverARConfig
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., in) to (..., features)."""
        config = self.config
        init = nn.initializers.normal(config.init_scale)
        shape = (x.shape[-1], self.features)
        prepared = self.get_variable("params", "kernel")
        if isinstance(prepared, DecodingKernel):
            y = prepared(x).astype(config.dtype)
        else:
            kernel = self.param("kernel", init, shape, jnp.dtype(config.param_dtype))
            y = _matmul(x.astype(config.dtype), kernel, config.gradient_dtype)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), jnp.dtype(config.param_dtype))
            y += bias.astype(config.dtype)
        return y


class LayerNorm(nn.Module):
    """PyTorch's LayerNorm: epsilon 1e-5, statistics in float32."""

    config: PerceiverARConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D) in the config's dtype."""
        shape, dtype = (x.shape[-1],), jnp.dtype(self.config.param_dtype)
        scale = self.param("scale", nn.initializers.ones_init(), shape, dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, dtype)
        x = x.astype(jnp.float32)
        mean = checkpoint_name(x.mean(axis=-1, keepdims=True), "statistics")
        # The gradient of the variance by the mean is 0; saying so saves a sum over D.
        centred = x - jax.lax.stop_gradient(mean)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        inverse_std = checkpoint_name(jax.lax.rsqrt(variance + 1e-5), "statistics")
        return ((x - mean) * (inverse_std * scale) + bias).astype(self.config.dtype)


class MLP(nn.Module):
    """LayerNorm, up, exact GELU, down. Source: `MLP` of perceiver-io."""

    widening_factor: int
    config: PerceiverARConfig

    def setup(self):
        width = self.config.num_channels
        self.norm = LayerNorm(self.config)
        self.up = Dense(self.widening_factor * width, self.config)
        self.down = Dense(width, self.config)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """(B, L, D) to (B, L, D)."""
        hidden_BLF = checkpoint_name(self.up(self.norm(x_BLD)), "mlp_up")
        return self.down(gelu(hidden_BLF))


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, in float32 within, as torch's autocast computes it.

    Through erf: XLA's CPU code for erfc, which jax.nn.gelu takes, is slower.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 0.5**0.5))).astype(x.dtype)


class MultiHeadAttention(nn.Module):
    """Projections around an attention implementation. Source: `MultiHeadAttention` of perceiver-io.

    Queries are scaled before they are rotated, as in the reference.
    """

    config: PerceiverARConfig
    max_heads_parallel: int | None = None
    out_bias: bool = False

    def setup(self):
        width = self.config.num_channels
        self.q_proj = Dense(width, self.config)
        self.k_proj = Dense(width, self.config)
        self.v_proj = Dense(width, self.config)
        self.o_proj = Dense(width, self.config, use_bias=self.out_bias)

    def queries(self, x_BLD: jax.Array, rotation: Rotation | None) -> jax.Array:
        """Scaled and rotated queries, (B, L, N, H)."""
        q_BLNH = self._split(self.q_proj(x_BLD)) * self.config.head_dim**-0.5
        q_BLNH = q_BLNH if rotation is None else rotate(q_BLNH, rotation)
        return checkpoint_name(q_BLNH, "qkv")

    def keys_values(self, x_BKD: jax.Array, rotation: Rotation | None) -> KeysValues:
        """Rotated keys, and values, (B, K, N, H) each."""
        k_BKNH, v_BKNH = self._split(self.k_proj(x_BKD)), self._split(self.v_proj(x_BKD))
        k_BKNH = k_BKNH if rotation is None else rotate(k_BKNH, rotation)
        return KeysValues(checkpoint_name(k_BKNH, "qkv"), checkpoint_name(v_BKNH, "qkv"))

    def attend(
        self, q_BLNH: jax.Array, kv: KeysValues, visibility: Visibility, *, deterministic: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Output (B, L, N, H) before the projection, and log-sum-exp (B, N, L)."""
        return attend(
            q_BLNH,
            *kv,
            visibility,
            config=self.config,
            dropout=self.weights_dropout(deterministic),
            max_heads=self.max_heads_parallel,
            over_context=not visibility.causal,
        )

    def weights(
        self,
        x_BLD: jax.Array,
        rotation: Rotation | None,
        visible: Visibility,
        before: Sequence[tuple[jax.Array, Visibility]] = (),
    ) -> jax.Array:
        """What latents read of the keys before them and of each other: (B, N, L, K) float32."""
        k_BLNH = self.keys_values(x_BLD, rotation).k
        return attention_weights(self.queries(x_BLD, rotation), [*before, (k_BLNH, visible)])

    def weights_dropout(self, deterministic: bool) -> Dropout | None:
        """A new draw of what is dropped of the attention weights."""
        rate = 0.0 if deterministic else self.config.post_attention_dropout
        return Dropout(rate, self.make_rng("dropout")) if rate else None

    def project(self, out_BLNH: jax.Array) -> jax.Array:
        """Joins the heads: (B, L, D)."""
        return self.o_proj(out_BLNH.reshape(*out_BLNH.shape[:2], self.config.num_channels))

    def _split(self, x_BSD: jax.Array) -> jax.Array:
        return x_BSD.reshape(*x_BSD.shape[:2], self.config.num_heads, self.config.head_dim)


class CrossAttentionLayer(nn.Module):
    """The hybrid first layer: latents attend to the prefix and, causally, to themselves.

    Keys and values come from kv_norm(prefix) and q_norm(latents); the residual is the latents as
    they came in. Source: paper (arXiv 2202.07765) section 3; `CrossAttentionLayer` of perceiver-io.
    """

    config: PerceiverARConfig

    def setup(self):
        config = self.config
        self.q_norm = LayerNorm(config)
        self.kv_norm = LayerNorm(config)
        self.attention = MultiHeadAttention(config, config.max_heads_parallel, out_bias=True)
        self.mlp = MLP(config.cross_attention_widening_factor, config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def prefix_keys_values(self, prefix_BPD: jax.Array, rotation_BP: Rotation) -> KeysValues:
        """Keys and values of prefix positions, each a function of its own position alone."""
        return self.attention.keys_values(self.kv_norm(prefix_BPD), rotation_BP)

    def __call__(
        self,
        latents_BLD: jax.Array,
        rotation_BL: Rotation,
        visible_latents: Visibility,
        attend_prefix: Attention | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KeysValues]:
        """Returns latents (B, L, D), and their keys and values.

        Args:
          latents_BLD: embedded tokens.
          rotation_BL: of their positions.
          visible_latents: what they see of each other.
          attend_prefix: attention to the prefix; None where there is none.
          deterministic: whether nothing is dropped.
        """
        normed_BLD = self.q_norm(latents_BLD)
        q_BLNH = self.attention.queries(normed_BLD, rotation_BL)
        kv = self.attention.keys_values(normed_BLD, rotation_BL)
        parts = [self.attention.attend(q_BLNH, kv, visible_latents, deterministic=deterministic)]
        if attend_prefix is not None:
            parts.append(attend_prefix(q_BLNH))
        out_BLNH, _ = merge(parts)
        return _residual_branches(self, latents_BLD, out_BLNH, deterministic), kv

    def decode_step(
        self,
        latents_BTD: jax.Array,
        rotation_BT: Rotation,
        cache: LayerCache,
        slots_T: jax.Array,
        mask_BTK: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """More latents per row: their keys and values join the cache in these slots."""
        return _decode_step(self, self.q_norm, latents_BTD, rotation_BT, cache, slots_T, mask_BTK)


class SelfAttentionLayer(nn.Module):
    """A pre-norm decoder layer over the latents. Source: `SelfAttentionLayer` of perceiver-io."""

    config: PerceiverARConfig

    def setup(self):
        config = self.config
        self.norm = LayerNorm(config)
        self.attention = MultiHeadAttention(config)
        self.mlp = MLP(config.self_attention_widening_factor, config)
        self.dropout = nn.Dropout(config.residual_dropout)

    def __call__(
        self,
        x_BLD: jax.Array,
        rotation_BL: Rotation | None,
        visible: Visibility,
        *,
        deterministic: bool = True,
    ) -> tuple[jax.Array, KeysValues]:
        """Returns latents (B, L, D), and their keys and values."""
        normed_BLD = self.norm(x_BLD)
        q_BLNH = self.attention.queries(normed_BLD, rotation_BL)
        kv = self.attention.keys_values(normed_BLD, rotation_BL)
        out_BLNH, _ = self.attention.attend(q_BLNH, kv, visible, deterministic=deterministic)
        return _residual_branches(self, x_BLD, out_BLNH, deterministic), kv

    def decode_step(
        self,
        x_BTD: jax.Array,
        rotation_BT: Rotation | None,
        cache: LayerCache,
        slots_T: jax.Array,
        mask_BTK: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:
        """More latents per row, as in the hybrid layer."""
        return _decode_step(self, self.norm, x_BTD, rotation_BT, cache, slots_T, mask_BTK)


def _decode_step(layer, norm, x_BTD, rotation_BT, cache, slots_T, mask_BTK):
    normed_BTD = norm(x_BTD)
    q_BTNH = layer.attention.queries(normed_BTD, rotation_BT)
    cache = cache.write_each(layer.attention.keys_values(normed_BTD, rotation_BT), slots_T)
    return _residual_branches(layer, x_BTD, cache.attend(q_BTNH, mask_BTK), True), cache


def _residual_branches(layer, x_BLD, out_BLNH, deterministic):
    out_BLD = layer.attention.project(out_BLNH)
    x_BLD = checkpoint_name(
        x_BLD + layer.dropout(out_BLD, deterministic=deterministic), "attention_residual"
    )
    x_BLD += layer.dropout(layer.mlp(x_BLD), deterministic=deterministic)
    return constrain(x_BLD, "batch", None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, kernel, gradient_dtype):
    """The product in x's dtype. The kernel comes in its own, so that its gradient may keep it."""
    rows = _letters_of_rows(x)
    return product(f"{rows}D,DF->{rows}F", x, kernel.astype(x.dtype))


def _matmul_forward(x, kernel, gradient_dtype):
    return _matmul(x, kernel, gradient_dtype), (x, kernel)


def _matmul_backward(gradient_dtype, saved, dy):
    x, kernel = saved
    # Not flattened to rows: where positions are spread over devices, that would gather them.
    rows = _letters_of_rows(x)
    dx = product(f"{rows}F,DF->{rows}D", dy, kernel.astype(x.dtype))
    dkernel = product(f"{rows}D,{rows}F->DF", x, dy, gradient_dtype)
    return dx, dkernel.astype(kernel.dtype)


def _letters_of_rows(x):
    return "BLK"[: x.ndim - 1]


_matmul.defvjp(_matmul_forward, _matmul_backward)
