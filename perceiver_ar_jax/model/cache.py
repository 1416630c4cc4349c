"""The state of decoding: keys and values of what was read, and which of it is still visible."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from perceiver_ar_jax.model.attention import cached
from perceiver_ar_jax.model.quantisation import quantised


class KeysValues(NamedTuple):
    """Keys and values of one attention layer, (B, K, N, H) each; keys are rotated."""

    k: jax.Array
    v: jax.Array

    def followed_by(self, other: "KeysValues") -> "KeysValues":
        """The keys and values of both, in that order."""
        return KeysValues(
            *(jnp.concatenate(pair, axis=1) for pair in zip(self, other, strict=True))
        )


class LayerCache(NamedTuple):
    """Keys and values of one attention layer in slots, laid out for one query per head.

    (B, N, H, K) each, and (N, H, K) where B is 1. Otherwise XLA on CPU would transpose the cache
    at every step, and copy it where a dimension is 1: up to ten times the time of the attention.
    In int8 each head's vector has a scale, (B, N, K) or (N, K) float32; otherwise there is none.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @classmethod
    def of(cls, kv: KeysValues, dtype: str | None = None) -> "LayerCache":
        """One slot per key; in int8, or in the dtype of the keys where `dtype` is None."""
        scales = ()
        if dtype == "int8":
            kv, scales = zip(*map(quantised, kv), strict=True)
        slots_last = lambda x_BKNH: _without_single(x_BKNH.transpose(0, 2, 3, 1))
        return cls(*map(slots_last, kv), *(slots_last(x)[..., 0, :] for x in scales))

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.k.shape[-1]

    def write(self, new: KeysValues, slot: jax.Array | int) -> "LayerCache":
        """Puts keys and values, of one token or several, into slots from `slot` on."""
        new = LayerCache.of(new, None if self.k_scale is None else "int8")
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-1)
        return jax.tree.map(lambda x, y: update(x, y, slot), self, new)

    def read(self, slot: jax.Array | int, size: int, *, batch: int, dtype: DTypeLike) -> KeysValues:
        """Keys and values of `size` slots from `slot` on."""
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, slot, size, axis=-1)
        part = jax.tree.map(cut, self)

        def as_keys(x, scale):
            if scale is not None:
                x = (x * jnp.expand_dims(scale, -2)).astype(dtype)
            return x.reshape(batch, *x.shape[-3:]).transpose(0, 3, 1, 2)

        return KeysValues(as_keys(part.k, part.k_scale), as_keys(part.v, part.v_scale))

    def write_each(self, new: KeysValues, slots_T: jax.Array) -> "LayerCache":
        """Puts the keys and values of new tokens, (B, T, N, H), into these slots."""
        # One update per token: the slots may begin again at 0, and scatter is slower on CPU.
        cache = self
        for index in range(new.k.shape[1]):
            token = KeysValues(*(x_BTNH[:, index : index + 1] for x_BTNH in new))
            cache = cache.write(token, slots_T[index])
        return cache

    def attend(self, q_BTNH: jax.Array, mask_BTK: jax.Array) -> jax.Array:
        """Attention of new tokens to what is in the slots: (B, T, N, H)."""
        if q_BTNH.shape[1] > 1:
            q, mask = _without_single(q_BTNH), _without_single(mask_BTK)
            return cached.attend_several(q, self, mask).reshape(q_BTNH.shape)
        q, mask = _without_single(q_BTNH[:, 0]), _without_single(mask_BTK[:, 0])
        return cached.attend(q, self, mask).reshape(q_BTNH.shape)

    def attention_weights(self, q_BNH: jax.Array, mask_BK: jax.Array) -> jax.Array:
        """What one token per row reads of the slots: (B, N, K) float32."""
        q, mask = _without_single(q_BNH), _without_single(mask_BK)
        weights = cached.attention_weights(q, self, mask)
        return weights.reshape(*q_BNH.shape[:2], self.capacity)

    def padded_to(self, capacity: int) -> "LayerCache":
        """The same with empty slots behind, `capacity` in all."""
        more = capacity - self.capacity
        pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
        return jax.tree.map(pad, self)

    def take(self, rows_B: jax.Array) -> "LayerCache":
        """The cache of some rows."""
        single = self.k.ndim == 3
        take = lambda x: _without_single((x[None] if single else x)[rows_B])
        return jax.tree.map(take, self)


@struct.dataclass
class Cache:
    """What `PerceiverAR.decode_step` reads and returns.

    A column is a place in the left-padded batch of prompts, or of a token generated since. Column
    c lives in slot c modulo the capacity, so that a full cache slides: the newest column takes
    the place of the oldest. Keys are rotated at their column, which never changes: attention sees
    differences of positions only, so this equals the reference's renumbering at every step.

    A token sees as many of the newest columns as there are slots, less `ahead`. So up to
    `ahead` tokens can be read after the next one and taken back, by setting `length`: the columns
    whose slots they take are seen by no token that stays.
    """

    cross: LayerCache  # K slots: prefix and latents
    layers: tuple[LayerCache, ...]  # K slots for each self-attention layer: latents only
    pads_B: jax.Array  # padded columns of each row
    first_latent: jax.Array  # the first column that is a latent
    length: jax.Array  # columns so far
    ahead: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def of_prompt(
        cls, cross: LayerCache, layers: tuple[LayerCache, ...], pads_B: jax.Array, prefix_len: int
    ) -> "Cache":
        """Holds a prompt that was just read, without room for more."""
        return cls(
            cross=cross,
            layers=layers,
            pads_B=pads_B,
            first_latent=jnp.int32(prefix_len),
            length=jnp.int32(cross.capacity),
        )

    @property
    def num_latents(self) -> jax.Array:
        """Latents read so far, those that have become prefix included."""
        return self.length - self.first_latent

    def with_room(self, *, columns: int, latents: int, ahead: int = 0) -> "Cache":
        """A prompt's cache with empty slots for what follows: a token sees so many columns."""
        return self.replace(
            cross=self.cross.padded_to(columns + ahead),
            layers=tuple(kv.padded_to(latents + ahead) for kv in self.layers),
            ahead=ahead,
        )

    def take(self, rows_B: jax.Array) -> "Cache":
        """The cache of some rows, in that order, possibly several times (beams, candidates)."""
        return self.replace(
            cross=self.cross.take(rows_B),
            layers=tuple(kv.take(rows_B) for kv in self.layers),
            pads_B=self.pads_B[rows_B],
        )

    def cross_slots_and_mask(self, num_tokens: int) -> tuple[jax.Array, jax.Array]:
        """Where the next columns go in `cross`, (T,), and what each sees there, (B, T, K)."""
        capacity = self.cross.capacity
        visible_TK, columns_K = self._visible(self.length, capacity, num_tokens)
        mask_BTK = visible_TK & (columns_K >= self.pads_B[:, None])[:, None]
        return (self.length + jnp.arange(num_tokens)) % capacity, mask_BTK

    def layer_slots_and_mask(self, num_tokens: int) -> tuple[jax.Array, jax.Array]:
        """Where the next latents go in each of `layers`, (T,), and what each sees, (B, T, K)."""
        capacity = self.layers[0].capacity if self.layers else 1
        visible_TK, latents_K = self._visible(self.num_latents, capacity, num_tokens)
        first_B = jnp.maximum(self.pads_B - self.first_latent, 0)
        mask_BTK = visible_TK & (latents_K >= first_B[:, None])[:, None]
        return (self.num_latents + jnp.arange(num_tokens)) % capacity, mask_BTK

    def _visible(self, first, capacity, num_tokens):
        """Which slots each token sees, (T, K), and the column of each slot, (K,)."""
        columns_T1 = first + jnp.arange(num_tokens)[:, None]
        columns_K = _newest_columns(columns_T1[-1], capacity)
        distance_TK = columns_T1 - columns_K
        return (distance_TK >= 0) & (distance_TK < capacity - self.ahead), columns_K


def _without_single(x):
    return x[0] if len(x) == 1 else x


def _newest_columns(newest: jax.Array, capacity: int) -> jax.Array:
    """The column each slot holds once `newest` is written; negative where none is yet, (K,)."""
    return newest - (newest - jnp.arange(capacity)) % capacity
