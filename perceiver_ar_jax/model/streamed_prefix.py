"""A prefix read in chunks, so that its length costs time but no memory.

A chunk of token ids is embedded, normalised, projected, rotated and attended to, and the result is
merged into the running output and log-sum-exp of the queries. The backward pass computes each chunk
again and takes its gradients from the log-sum-exp over all keys, as in FlashAttention (arXiv
2205.14135). Nothing as long as the prefix is saved but the token ids.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model.attention import (
    Dropout,
    Visibility,
    attend_to_nothing,
    merge,
    passes,
)
from perceiver_ar_jax.model.cache import KeysValues, LayerCache
from perceiver_ar_jax.model.inputs import Inputs
from perceiver_ar_jax.model.layers import CrossAttentionLayer, embed
from perceiver_ar_jax.model.positions import rotation
from perceiver_ar_jax.parallel import CONTEXT, has_context, on_own_keys, on_own_rows

WHOLE = PartitionSpec()  # the same on all devices of the axis


class PrefixParams(NamedTuple):
    """The parameters that turn token ids into keys and values of the hybrid layer."""

    tables: tuple[Any, ...]  # of token embeddings, and of position embeddings if there are any
    layer: Any  # a part of CrossAttentionLayer's: what prefix_keys_values reads

    @classmethod
    def of(cls, tables: tuple[Any, ...], layer: CrossAttentionLayer) -> "PrefixParams":
        """Those of a bound layer."""
        params = layer.variables["params"]
        projections = {name: params["attention"][name] for name in ("k_proj", "v_proj")}
        return cls(tables, {"kv_norm": params["kv_norm"], "attention": projections})


def is_streamed(prefix_len: int, config: PerceiverARConfig) -> bool:
    """Whether a prefix of this length is read in chunks: where it does not fit into one."""
    return 0 < config.prefix_chunk < prefix_len


def attend(
    q_BLNH: jax.Array,
    params: PrefixParams,
    prefix: Inputs,
    segment_ids_BL: jax.Array | None,
    config: PerceiverARConfig,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a prefix: output (B, L, N, H) and log-sum-exp (B, N, L).

    On a mesh each device reads its own rows, and its own part of the prefix where there is a
    context axis; gradients of parameters are summed over devices once.

    Args:
      q_BLNH: queries, scaled and rotated.
      params: of embedding, norm and projections.
      prefix: token ids, positions, padding and documents.
      segment_ids_BL: the document of each query; None where the prefix has none.
      config: sets the length of a chunk, `prefix_chunk`.
      dropout: of the attention weights; draws depend on the number of devices.
    """
    batch = len(q_BLNH)
    prefix = prefix.with_all_positions()
    if dropout is not None:  # a device takes the first of its rows' keys
        dropout = dropout.replace(key=jax.random.split(dropout.key, batch))
    axis = CONTEXT if has_context(prefix.length) else None
    return _attend(config, axis, q_BLNH, params, prefix, segment_ids_BL, dropout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(config, axis, *inputs):
    return _forward(config, axis, *inputs)[0]


def _forward(config, axis, *inputs):
    run = functools.partial(_read, config, axis)
    if axis is not None:
        in_specs = _specs_of_inputs(axis)
        run = on_own_keys(run, axis, in_specs=in_specs, out_specs=(WHOLE, WHOLE))
    run = on_own_rows(run, in_rows=(True, False, True, True, True), out_rows=(True, True))
    out_BLNH, lse_BNL = (checkpoint_name(x, "streamed_prefix") for x in run(*inputs))
    return (out_BLNH, lse_BNL), (*inputs, out_BLNH, lse_BNL)


def _backward(config, axis, saved, gradients):
    run = functools.partial(_read_again, config, axis)
    if axis is not None:
        in_specs = (*_specs_of_inputs(axis), WHOLE, WHOLE, WHOLE, WHOLE)
        run = on_own_keys(run, axis, in_specs=in_specs, out_specs=(WHOLE, WHOLE))
    in_rows = (True, False, *[True] * 7)
    run = on_own_rows(run, in_rows=in_rows, out_rows=(True, False))
    return *run(*saved, *gradients), None, None, None


_attend.defvjp(_forward, _backward)


def _read(config, axis, q_BLNH, params, prefix, segment_ids_BL, dropout):
    forward, _ = _passes(config, q_BLNH, segment_ids_BL, dropout)

    def attend_to(start, size):
        chunk = prefix.columns(start, size)
        kv = _keys_values(config, params.layer, _embed(params, chunk), chunk)
        visible = _visibility(chunk, segment_ids_BL)
        return forward(q_BLNH, *kv, visible, _own(dropout, axis, start))

    part = _merged(attend_to, q_BLNH, prefix.length, config.prefix_chunk)
    out_BLNH, lse_BNL = part if axis is None else merge([part], axis)
    return out_BLNH.astype(q_BLNH.dtype), lse_BNL


def _read_again(
    config,
    axis,
    q_BLNH,
    params,
    prefix,
    segment_ids_BL,
    dropout,
    *results_and_gradients,
):
    _, backward = _passes(config, q_BLNH, segment_ids_BL, dropout)

    def add_gradients(sums, start, size):
        chunk = prefix.columns(start, size)
        run = lambda layer, x_BCD: _keys_values(config, layer, x_BCD, chunk)
        kv, pull = jax.vjp(run, params.layer, _embed(params, chunk))
        visible = _visibility(chunk, segment_ids_BL)
        drop = _own(dropout, axis, start)
        dq_BLNH, *dkv = backward(q_BLNH, *kv, visible, drop, *results_and_gradients)
        dlayer, dx_BCD = pull(KeysValues(*dkv))
        dq_sum_BLNH, dparams = sums
        # Into the running sum: a gradient of the whole table per chunk would cost a pass over it.
        indices = chunk.tokens_BS, chunk.positions_BS
        dtables = [
            dtable.at[index_BC].add(dx_BCD, mode="clip")
            for dtable, index_BC in zip(dparams.tables, indices, strict=False)
        ]
        dlayer = jax.tree.map(jnp.add, dparams.layer, dlayer)
        return dq_sum_BLNH + dq_BLNH, PrefixParams(tuple(dtables), dlayer)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q_BLNH, params))
    sums = _over_chunks(add_gradients, zeros, prefix.length, config.prefix_chunk)
    if axis is not None:
        sums = jax.lax.psum(sums, axis)
    return jax.tree.map(lambda sum_, x: sum_.astype(x.dtype), sums, (q_BLNH, params))


def fill_cache(
    params: PrefixParams, prefix: Inputs, config: PerceiverARConfig, capacity: int
) -> LayerCache:
    """A cache with the keys and values of a prefix in its first slots, `capacity` slots in all."""
    batch = len(prefix.tokens_BS)
    shape = (batch, 1, config.num_heads, config.head_dim)
    empty = KeysValues(*[jnp.zeros(shape, config.dtype)] * 2)

    def write(cache, start, size):
        chunk = prefix.columns(start, size)
        kv = _keys_values(config, params.layer, _embed(params, chunk), chunk)
        return cache.write(kv, start)

    cache = LayerCache.of(empty, config.cache_dtype).padded_to(capacity)
    return _over_chunks(write, cache, prefix.length, config.prefix_chunk)


def attend_to_cache(
    q_BLNH: jax.Array, cache: LayerCache, prefix: Inputs, config: PerceiverARConfig
) -> tuple[jax.Array, jax.Array]:
    """Attention to a prefix whose keys and values are in a cache, as `attend`; no gradients."""
    forward, _ = _passes(config, q_BLNH, None, None)

    def attend_to(start, size):
        kv = cache.read(start, size, batch=len(q_BLNH), dtype=q_BLNH.dtype)
        visible = _visibility(prefix.columns(start, size), None)
        return forward(q_BLNH, *kv, visible)

    out_BLNH, lse_BNL = _merged(attend_to, q_BLNH, prefix.length, config.prefix_chunk)
    return out_BLNH.astype(q_BLNH.dtype), lse_BNL


def _merged(attend_to: Callable, q_BLNH, length, chunk):
    """Attention to all chunks, in float32: the mean of a thousand roundings would be off."""

    def fold(running, start, size):
        out_BLNH, lse_BNL = attend_to(start, size)
        return merge([running, (out_BLNH.astype(jnp.float32), lse_BNL)])

    return _over_chunks(fold, attend_to_nothing(q_BLNH.astype(jnp.float32)), length, chunk)


def _over_chunks(step: Callable, carry, length: int, chunk: int):
    """`carry = step(carry, start, size)` for consecutive chunks, first what does not fill one."""
    chunk = min(chunk, length)  # a device of the context axis may hold less
    rest = length % chunk
    if rest:
        carry = step(carry, 0, rest)
    body = lambda index, carry: step(carry, rest + index * chunk, chunk)
    return jax.lax.fori_loop(0, length // chunk, body, carry)


def _passes(config, q_BLNH, segment_ids_BL, dropout):
    return passes(
        config,
        num_queries=q_BLNH.shape[1],
        has_dropout=dropout is not None,
        has_segments=segment_ids_BL is not None,
    )


def _embed(params, chunk):
    return embed(params.tables, chunk.tokens_BS, chunk.positions_BS)


def _keys_values(config, layer_params, x_BCD, chunk):
    return CrossAttentionLayer(config, parent=None).apply(
        {"params": layer_params},
        x_BCD,
        rotation(chunk.positions_BS, config),
        method="prefix_keys_values",
    )


def _visibility(chunk, segment_ids_BL):
    return Visibility(chunk.pad_mask_BS, segment_ids_BL, chunk.segment_ids_BS)


def _own(dropout, axis, start):
    """What a device draws for one chunk."""
    if dropout is None:
        return None
    dropout = dropout.replace(key=dropout.key[0]).fold_in(start)
    return dropout if axis is None else dropout.fold_in(jax.lax.axis_index(axis))


def _specs_of_inputs(axis):
    """How queries, parameters, prefix, documents of queries and dropout lie on an axis."""
    return WHOLE, WHOLE, PartitionSpec(None, axis), WHOLE, WHOLE
