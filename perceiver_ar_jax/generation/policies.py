"""Decoding policies: what a new token reads once the latents are used up.

A policy is a hashable value, static under jit. `start` makes the decoding state of a prompt,
`step` reads one more token per row. States are pytrees with `take(rows)`.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.prompt import latents_with_room
from perceiver_ar_jax.model import Cache, PerceiverAR


class Policy(Protocol):
    """What `generate` asks of a policy."""

    def start(self, context: Context, max_new_tokens: int, config: PerceiverARConfig) -> Any:
        """The state in which `max_new_tokens` can follow the prompt."""

    def step(
        self, model: PerceiverAR, params: Any, tokens_B: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """Reads one token per row: its hidden state (B, D), and the new state."""


@runtime_checkable
class ReadsAhead(Policy, Protocol):
    """A policy that can read several tokens at once, some of which may be taken back."""

    def start(
        self, context: Context, max_new_tokens: int, config: PerceiverARConfig, ahead: int = 0
    ) -> Any:
        """As in `Policy`, with room for `ahead` tokens after the next one."""

    def read_ahead(
        self, model: PerceiverAR, params: Any, tokens_BT: jax.Array, state: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Reads 1 + `ahead` tokens per row: hidden states (B, T, D), how many of them are what
        `step` would give, at least 1, and the state after the first token.
        """

    def keep(self, tokens_BT: jax.Array, count: jax.Array, state: Any) -> Any:
        """The state after the first `count` of the tokens just read ahead."""


@dataclasses.dataclass(frozen=True)
class Slide:
    """Every new token is a latent; the oldest latent becomes prefix without being recomputed.

    The fastest policy. Latents that became prefix keep the keys and values of a latent.
    Source: `generate(use_cache=True)` of perceiver-io 0.11.
    """

    def start(
        self, context: Context, max_new_tokens: int, config: PerceiverARConfig, ahead: int = 0
    ) -> Cache:
        """A cache for the whole text, or for the model's maximum."""
        columns = context.tokens_BS.shape[1] + max_new_tokens
        latents = context.hidden_BLD.shape[1] + max_new_tokens
        return context.cache.with_room(
            columns=min(columns, config.max_seq_len),
            latents=min(latents, config.max_latents),
            ahead=ahead,
        )

    def step(
        self, model: PerceiverAR, params: Any, tokens_B: jax.Array, state: Cache
    ) -> tuple[jax.Array, Cache]:
        """One step over the cache, which slides when it is full."""
        return model.apply({"params": params}, tokens_B, state, method="decode_step")

    def read_ahead(
        self, model: PerceiverAR, params: Any, tokens_BT: jax.Array, state: Cache
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """One pass over the cache; all tokens count."""
        hidden_BTD, read = model.apply({"params": params}, tokens_BT, state, method="decode_steps")
        return hidden_BTD, jnp.int32(tokens_BT.shape[1]), read.replace(length=state.length + 1)

    def keep(self, tokens_BT: jax.Array, count: jax.Array, state: Cache) -> Cache:
        """A longer cache."""
        return state.replace(length=state.length + count - 1)


@struct.dataclass
class Window:
    """The state of `Reset`: a cache, and the newest tokens, which a full pass reads again."""

    cache: Cache
    tokens_BW: jax.Array  # padded on the left
    pads_B: jax.Array

    def take(self, rows_B: jax.Array) -> "Window":
        """The state of some rows, possibly several times."""
        return Window(self.cache.take(rows_B), self.tokens_BW[rows_B], self.pads_B[rows_B])

    def append(self, tokens_BT: jax.Array, count: jax.Array | int) -> "Window":
        """Moves the window by the first `count` tokens; the cache has not read them yet."""
        tokens_BS = jnp.concatenate([self.tokens_BW, tokens_BT], axis=1)
        width = self.tokens_BW.shape[1]
        tokens_BW = jax.lax.dynamic_slice_in_dim(tokens_BS, count, width, axis=1)
        return Window(self.cache, tokens_BW, jnp.maximum(self.pads_B - count, 0))


@dataclasses.dataclass(frozen=True)
class Reset:
    """When the latents are used up, one full pass makes the newest `refill` tokens the latents.

    So what has become prefix is read as prefix, unlike in `Slide`. Between two such passes the
    cache is exact: a token costs a step, one in (max_latents - refill + 1) a full pass.
    The pass reads at most max_prefix_len + refill tokens, the newest.

    Source: paper (arXiv 2202.07765), appendix E.3.

    Args:
      refill: latents after a full pass, 1 to max_latents; None is the larger of
        max_latents - 128 and max_latents // 2, and at least 1.
    """

    refill: int | None = None

    def start(
        self, context: Context, max_new_tokens: int, config: PerceiverARConfig, ahead: int = 0
    ) -> Window:
        """Room for max_latents latents, and for the longest prefix that can occur."""
        length = context.tokens_BS.shape[1]
        refill = self.latents_after(config)
        prefix_len = min(length + max_new_tokens - refill, config.max_prefix_len)
        width = max(prefix_len, 0) + refill
        missing = width - length
        tokens_BW = jnp.pad(context.tokens_BS, ((0, 0), (max(missing, 0), 0)))[:, -width:]
        prompt_prefix_len = length - context.hidden_BLD.shape[1]
        cache = context.cache.with_room(
            columns=max(width - refill, prompt_prefix_len) + config.max_latents,
            latents=config.max_latents,
            ahead=ahead,
        )
        return Window(cache, tokens_BW, jnp.maximum(cache.pads_B + missing, 0))

    def step(
        self, model: PerceiverAR, params: Any, tokens_B: jax.Array, state: Window
    ) -> tuple[jax.Array, Window]:
        """One step over the cache while latents are left, otherwise a full pass over the window."""
        hidden_B1D, _, state = self.read_ahead(model, params, tokens_B[:, None], state)
        return hidden_B1D[:, 0], state

    def read_ahead(
        self, model: PerceiverAR, params: Any, tokens_BT: jax.Array, state: Window
    ) -> tuple[jax.Array, jax.Array, Window]:
        """The tokens until the latents are used up count; of a full pass the first one only."""
        left = model.config.max_latents - state.cache.num_latents
        state = state.append(tokens_BT, 1)

        def read_again(cache):
            pad_mask_BW = jnp.arange(state.tokens_BW.shape[1]) < state.pads_B[:, None]
            prefix_len = state.tokens_BW.shape[1] - self.latents_after(model.config)
            hidden_BLD, fresh = model.apply(
                {"params": params}, state.tokens_BW, prefix_len, pad_mask_BW, method="prefill"
            )
            columns = cache.cross.capacity - cache.ahead
            fresh = fresh.with_room(
                columns=columns, latents=model.config.max_latents, ahead=cache.ahead
            )
            others = ((0, 0), (0, tokens_BT.shape[1] - 1), (0, 0))
            return jnp.pad(hidden_BLD[:, -1:], others), jnp.int32(1), fresh

        def read_tokens(cache):
            hidden_BTD, read = model.apply(
                {"params": params}, tokens_BT, cache, method="decode_steps"
            )
            count = jnp.minimum(left, tokens_BT.shape[1])
            return hidden_BTD, count, read.replace(length=cache.length + 1)

        hidden_BTD, count, cache = jax.lax.cond(left == 0, read_again, read_tokens, state.cache)
        return hidden_BTD, count, state.replace(cache=cache)

    def keep(self, tokens_BT: jax.Array, count: jax.Array, state: Window) -> Window:
        """The window moves by the others too."""
        longer = state.cache.replace(length=state.cache.length + count - 1)
        return state.append(tokens_BT[:, 1:], count - 1).replace(cache=longer)

    def latents_after(self, config: PerceiverARConfig) -> int:
        """How many tokens a full pass makes latents."""
        if self.refill is None:
            return latents_with_room(config.max_latents)
        if not 0 < self.refill <= config.max_latents:
            raise ValueError(f"refill={self.refill} out of valid range [1..{config.max_latents}]")
        return self.refill


@dataclasses.dataclass(frozen=True)
class Recompute(Reset):
    """A full pass per token once the latents are used up: the oldest becomes prefix each time.

    Every token comes from an exact pass over the newest max_seq_len tokens, the newest max_latents
    of them latents. The slowest policy. Until the latents are used up the cache is exact too.
    """

    refill: None = dataclasses.field(default=None, init=False)

    def latents_after(self, config: PerceiverARConfig) -> int:
        """All of them."""
        return config.max_latents


POLICIES = {"slide": Slide(), "recompute": Recompute(), "reset": Reset()}
