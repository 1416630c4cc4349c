"""Attention on NVIDIA GPUs by cuDNN. Never run on one: the code around it is tested on CPU.

Away from GPUs, `jax.nn.dot_product_attention` computes the same by einsums.

cuDNN hides padding on the right only. Padding here is on the left, and rolls to the right: the
order of a prefix does not matter, and queries and keys of the causal part roll together.
"""

import functools

import jax
import jax.numpy as jnp

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model.attention.fused import fused
from perceiver_ar_jax.model.attention.visibility import MASK_VALUE, Visibility
from perceiver_ar_jax.parallel import platform_in_use


def takes(config: PerceiverARConfig, *, num_queries: int, has_segments: bool) -> bool:
    """Whether cuDNN has a kernel: 16-bit numbers, heads of up to 128 channels, no documents."""
    fits = config.head_dim % 8 == 0 and config.head_dim <= 128
    return config.dtype == "bfloat16" and fits and not has_segments


def forward(
    q_BLNH: jax.Array, k_BKNH: jax.Array, v_BKNH: jax.Array, visibility: Visibility
) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, N, H) and log-sum-exp (B, N, L), on one device."""
    padding = _Padding(visibility, q_BLNH.shape[1])
    arrays = padding.rolled(q_BLNH, k_BKNH, v_BKNH)
    if platform_in_use() == "gpu":
        # The public function rounds the log-sum-exp to bf16: a merge is then wrong by up to 2 %.
        from jax._src.cudnn import fused_attention_stablehlo as kernels

        causal, padded = visibility.causal, padding.lengths_B is not None
        masks = kernels.MaskType
        mask = (
            (masks.PADDING_CAUSAL if causal else masks.PADDING)
            if padded
            else (masks.CAUSAL if causal else masks.NO_MASK)
        )
        lengths = {"q_seqlen": padding.query_lengths_B, "kv_seqlen": padding.lengths_B}
        out_BLNH, lse_BNL = kernels.dot_product_attention(
            *arrays, **lengths, scale=1.0, mask_type=mask, return_residual=True
        )
    else:
        out_BLNH, lse_BLN = padding.attention(*arrays, return_residual=True)
        lse_BNL = jnp.swapaxes(lse_BLN, 1, 2).astype(jnp.float32)
    out_BLNH, lse_BLN = padding.unrolled(out_BLNH), padding.unrolled(jnp.swapaxes(lse_BNL, 1, 2))
    lse_BLN = padding.where_seen(lse_BLN, MASK_VALUE / 2)
    return padding.where_seen(out_BLNH, 0), jnp.swapaxes(lse_BLN, 1, 2)


def backward(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    visibility: Visibility,
    out_BLNH: jax.Array,
    lse_BNL: jax.Array,
    dout_BLNH: jax.Array,
    dlse_BNL: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values, on one device.

    cuDNN drops the gradient of the log-sum-exp. With weights p, it adds p · dlse to the gradient of
    the scores: to dq, dlse times attention with the keys as values; to dk, what dv would be if
    dlse · q were the gradient of the output.
    """
    padding = _Padding(visibility, q_BLNH.shape[1])
    rows = padding.rolled_queries
    arrays = padding.rolled(q_BLNH, k_BKNH, v_BKNH)
    _, pull = jax.vjp(padding.attention, *arrays)
    dq, dk, dv = pull(rows(padding.where_seen(dout_BLNH, 0)))
    if dlse_BNL is not None:
        q, k, _ = arrays
        dlse_BLN = rows(padding.where_seen(jnp.swapaxes(dlse_BNL, 1, 2), 0))
        mean_key, pull_values = jax.vjp(functools.partial(padding.attention, q, k), k)
        dq += (dlse_BLN[..., None] * mean_key).astype(dq.dtype)
        dk += pull_values((dlse_BLN[..., None] * q).astype(q.dtype))[0]
    return padding.unrolled(dq), padding.unrolled_keys(dk), padding.unrolled_keys(dv)


attend = fused(forward, backward)


class _Padding:
    """Padding on the left, which becomes padding on the right."""

    def __init__(self, visibility, num_queries):
        if visibility.segment_ids_BK is not None:
            raise ValueError("cuDNN attention does not separate documents; use `recompute`")
        self.causal = visibility.causal
        self.lengths_B = self.query_lengths_B = self.seen_BL = None
        pads_BK = visibility.pad_mask_BK
        if pads_BK is None:
            return
        self.pads_B = pads_BK.sum(axis=1, dtype=jnp.int32)
        real_B = pads_BK.shape[1] - self.pads_B
        self.lengths_B = jnp.maximum(real_B, 1)  # nothing is said of rows without keys
        self.query_lengths_B = self.lengths_B
        if not self.causal:
            self.query_lengths_B = jnp.full_like(real_B, num_queries)
        sees_from_B = self.pads_B if self.causal else jnp.where(real_B > 0, 0, num_queries)
        self.seen_BL = jnp.arange(num_queries) >= sees_from_B[:, None]

    def attention(self, q, k, v, **options):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=1.0,
            is_causal=self.causal,
            query_seq_lengths=self.query_lengths_B,
            key_value_seq_lengths=self.lengths_B,
            implementation="cudnn" if platform_in_use() == "gpu" else "xla",
            **options,
        )

    def rolled(self, q_BLNH, k_BKNH, v_BKNH):
        return self.rolled_queries(q_BLNH), self._roll(k_BKNH, 1), self._roll(v_BKNH, 1)

    def rolled_queries(self, x_BL):
        return self._roll(x_BL, 1) if self.causal else x_BL

    def unrolled(self, x_BL):
        return self._roll(x_BL, -1) if self.causal else x_BL

    def unrolled_keys(self, x_BK):
        return self._roll(x_BK, -1)

    def where_seen(self, x_BL, otherwise):
        """The array at queries that see a key."""
        if self.seen_BL is None:
            return x_BL
        seen_BL = jnp.expand_dims(self.seen_BL, range(2, x_BL.ndim))
        return jnp.where(seen_BL, x_BL, jnp.asarray(otherwise, x_BL.dtype))

    def _roll(self, x_BK, sign):
        if self.lengths_B is None:
            return x_BK
        size = x_BK.shape[1]
        columns_BK = (jnp.arange(size) + sign * self.pads_B[:, None]) % size
        columns = jnp.expand_dims(columns_BK, range(2, x_BK.ndim))
        return jnp.take_along_axis(x_BK, columns, axis=1)
