"""A prompt that the model has read, and the program that reads it."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.model import Cache, PerceiverAR
from perceiver_ar_jax.parallel import use_mesh


@struct.dataclass
class Context:
    """A prompt that the model has read."""

    tokens_BS: jax.Array  # padded on the left
    hidden_BLD: jax.Array  # of the prompt's latents
    cache: Cache  # without room for more

    def take(self, rows_B: jax.Array) -> "Context":
        """The context of some rows, possibly several times."""
        return Context(self.tokens_BS[rows_B], self.hidden_BLD[rows_B], self.cache.take(rows_B))

    def seen(self, vocab_size: int) -> jax.Array:
        """Which tokens occur in each row, not counting pads, (B, V)."""
        batch, columns = self.tokens_BS.shape
        pads_BS = jnp.arange(columns) < self.cache.pads_B[:, None]
        tokens_BS = jnp.where(pads_BS, vocab_size, self.tokens_BS)
        seen_BV = jnp.zeros((batch, vocab_size), bool)
        return seen_BV.at[jnp.arange(batch)[:, None], tokens_BS].set(True, mode="drop")


@functools.partial(jax.jit, static_argnames=("prefix_len", "model"))
def read_prompt(
    params: Any,
    tokens_BS: jax.Array,
    pad_mask_BS: jax.Array,
    *,
    prefix_len: int,
    model: PerceiverAR,
) -> tuple[Context, jax.Array]:
    """One pass over a prompt: the context, and the fingerprint of the parameters."""
    hidden_BLD, cache = model.apply(
        {"params": params}, tokens_BS, prefix_len, pad_mask_BS, method="prefill"
    )
    return Context(tokens_BS, hidden_BLD, cache), fingerprint(params)


def fingerprint(params: Any) -> jax.Array:
    """A number that differs between checkpoints, from a few elements of each array."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(params):
        few = x[(slice(0, 1),) * (x.ndim - 1) + (slice(0, 16),)].astype(jnp.float32)
        total = total * 31 + jax.lax.bitcast_convert_type(few, jnp.uint32).sum()
    return total


def mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """Within this context activations are placed on the mesh of the parameters, if there is one."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return use_mesh(sharding.mesh)
    return contextlib.nullcontext()
