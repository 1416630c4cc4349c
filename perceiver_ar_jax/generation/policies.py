"""Decoding policies: what a new token reads once the latents are used up.

A policy is a hashable value, static under jit. `start` makes the decoding state of a prompt,
`step` reads one more token a row. States are pytrees with `take(rows)`.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model import Cache, PerceiverAR


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
        """Which tokens occur in each row, pads aside, (B, V)."""
        batch, columns = self.tokens_BS.shape
        pads_BS = jnp.arange(columns) < self.cache.pads_B[:, None]
        tokens_BS = jnp.where(pads_BS, vocab_size, self.tokens_BS)
        seen_BV = jnp.zeros((batch, vocab_size), bool)
        return seen_BV.at[jnp.arange(batch)[:, None], tokens_BS].set(True, mode="drop")


class Policy(Protocol):
    """What `generate` asks of a policy."""

    def start(self, context: Context, max_new_tokens: int, config: PerceiverARConfig) -> Any:
        """The state in which `max_new_tokens` can follow the prompt."""

    def step(
        self, model: PerceiverAR, params: Any, tokens_B: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """Reads one token a row: its hidden state (B, D), and the new state."""


@dataclasses.dataclass(frozen=True)
class Slide:
    """Every new token is a latent; the oldest latent becomes prefix as it is, uncomputed.

    The fastest policy. Latents that became prefix keep the keys and values of a latent.
    Source: `generate(use_cache=True)` of perceiver-io 0.11.
    """

    def start(self, context: Context, max_new_tokens: int, config: PerceiverARConfig) -> Cache:
        """A cache for the whole text, or for the model's maximum."""
        columns = context.tokens_BS.shape[1] + max_new_tokens
        latents = context.hidden_BLD.shape[1] + max_new_tokens
        return context.cache.with_room(
            columns=min(columns, config.max_seq_len), latents=min(latents, config.max_latents)
        )

    def step(
        self, model: PerceiverAR, params: Any, tokens_B: jax.Array, state: Cache
    ) -> tuple[jax.Array, Cache]:
        """One step over the cache, which slides when it is full."""
        return model.apply({"params": params}, tokens_B, state, method="decode_step")


POLICIES = {"slide": Slide()}
