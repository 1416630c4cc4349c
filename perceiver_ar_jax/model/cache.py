"""The state of decoding: keys and values of what was read, and which of it is still visible."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class KeysValues(NamedTuple):
    """Keys and values of one attention layer, (B, K, N, H) each; keys are rotated."""

    k: jax.Array
    v: jax.Array


class LayerCache(NamedTuple):
    """Keys and values of one attention layer in slots, as decoding reads them fastest.

    With one query a head, XLA on CPU is ten times slower where it must transpose them first.
    """

    k_BNHK: jax.Array
    v_BNKH: jax.Array

    @classmethod
    def of(cls, kv: KeysValues) -> "LayerCache":
        """One slot a key."""
        return cls(kv.k.transpose(0, 2, 3, 1), kv.v.transpose(0, 2, 1, 3))

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.v_BNKH.shape[2]

    @property
    def keys_values(self) -> KeysValues:
        """What is in the slots, in the order of the slots."""
        return KeysValues(self.k_BNHK.transpose(0, 3, 1, 2), self.v_BNKH.transpose(0, 2, 1, 3))

    def write(self, new: KeysValues, slot: jax.Array) -> "LayerCache":
        """Puts the keys and values of one token into `slot`, a scalar."""
        new = LayerCache.of(new)
        update = jax.lax.dynamic_update_slice_in_dim
        return LayerCache(
            update(self.k_BNHK, new.k_BNHK, slot, axis=3),
            update(self.v_BNKH, new.v_BNKH, slot, axis=2),
        )

    def padded_to(self, capacity: int) -> "LayerCache":
        """The same with empty slots behind, `capacity` in all."""
        keep, empty = (0, 0), (0, capacity - self.capacity)
        return LayerCache(
            jnp.pad(self.k_BNHK, (keep, keep, keep, empty)),
            jnp.pad(self.v_BNKH, (keep, keep, empty, keep)),
        )


@struct.dataclass
class Cache:
    """What `PerceiverAR.decode_step` reads and returns.

    A column is a place in the left-padded batch of prompts, or of a token generated since. Column
    c lives in slot c modulo the capacity, so that a full cache slides: the newest column takes
    the place of the oldest. Keys are rotated at their column, which never changes: attention sees
    differences of positions only, so this equals the reference's renumbering at every step.
    """

    cross: LayerCache  # C slots: prefix and latents
    layers: tuple[LayerCache, ...]  # A slots for each self-attention layer: latents only
    pads_B: jax.Array  # padded columns of each row
    first_latent: jax.Array  # the first column that is a latent
    length: jax.Array  # columns so far

    @classmethod
    def of_prompt(
        cls, cross: KeysValues, layers: tuple[KeysValues, ...], pads_B: jax.Array, prefix_len: int
    ) -> "Cache":
        """Holds a prompt that was just read, without room for more."""
        return cls(
            cross=LayerCache.of(cross),
            layers=tuple(map(LayerCache.of, layers)),
            pads_B=pads_B,
            first_latent=jnp.int32(prefix_len),
            length=jnp.int32(cross.k.shape[1]),
        )

    @property
    def num_latents(self) -> jax.Array:
        """Latents read so far, those that have become prefix included."""
        return self.length - self.first_latent

    def with_room(self, *, columns: int, latents: int) -> "Cache":
        """A prompt's cache with empty slots for what follows, so many slots in all."""
        return self.replace(
            cross=self.cross.padded_to(columns),
            layers=tuple(kv.padded_to(latents) for kv in self.layers),
        )

    def take(self, rows_B: jax.Array) -> "Cache":
        """The cache of some rows, in that order, possibly several times (beams, candidates)."""
        per_row = (self.cross, self.layers, self.pads_B)
        cross, layers, pads_B = jax.tree.map(lambda x: x[rows_B], per_row)
        return self.replace(cross=cross, layers=layers, pads_B=pads_B)

    def cross_slot_and_mask(self) -> tuple[jax.Array, jax.Array]:
        """Where the next column goes in `cross`, and what it sees there, (B, 1, C)."""
        capacity = self.cross.capacity
        columns_C = _newest_columns(self.length, capacity)
        return self.length % capacity, (columns_C >= self.pads_B[:, None])[:, None]

    def layer_slot_and_mask(self) -> tuple[jax.Array, jax.Array]:
        """Where the next latent goes in each of `layers`, and what it sees there, (B, 1, A)."""
        capacity = self.layers[0].capacity if self.layers else 1
        latent = self.num_latents
        columns_A = self.first_latent + _newest_columns(latent, capacity)
        first_B = jnp.maximum(self.pads_B, self.first_latent)
        return latent % capacity, (columns_A >= first_B[:, None])[:, None]


def _newest_columns(newest: jax.Array, capacity: int) -> jax.Array:
    """The column each slot holds once `newest` is written; negative where none is yet, (K,)."""
    return newest - (newest - jnp.arange(capacity)) % capacity
