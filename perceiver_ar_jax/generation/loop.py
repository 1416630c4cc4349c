"""The generation loop. It takes the model as two functions and knows no tokenizer."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.sampling import Greedy, RepetitionPenalty, Sample


class Method(Protocol):
    """What finds a continuation: token by token, by beams, among candidates.

    The carry of the loop is a pytree of the method's own, with `count` (new tokens so far) and
    `ended_B` (prompts that need no more).
    """

    rows_per_prompt: int  # rows that the model reads for each prompt

    def begin(
        self,
        decoder: "Decoder",
        context: Context,
        state: Any,
        *,
        ending: "Ending",
        max_new_tokens: int,
    ) -> Any:
        """The carry at the end of a prompt, which `context` holds `rows_per_prompt` times."""

    def advance(self, decoder: "Decoder", progress: Any, ending: "Ending") -> Any:
        """The carry after one more token."""

    def finish(self, progress: Any) -> tuple[jax.Array, jax.Array]:
        """New tokens and their log-probabilities, (rows of the result, T) each."""


class Decoder(NamedTuple):
    """The model as search methods see it."""

    step: Callable[[jax.Array, Any], tuple[jax.Array, Any]]  # tokens_B, state -> hidden_BD, state
    head: Callable[[jax.Array], jax.Array]  # hidden_BD -> logits_BV


@struct.dataclass
class Ending:
    """What ends a row, and what follows its end."""

    eos_E: jax.Array
    pad: jax.Array

    def is_eos(self, tokens_B: jax.Array) -> jax.Array:
        """True where a token is one of those that end a row."""
        return (tokens_B[:, None] == self.eos_E).any(axis=1)


@struct.dataclass
class Progress:
    """What the loop carries from token to token."""

    state: Any  # of the policy, with a method `take(rows)`
    tokens_BT: jax.Array  # new tokens; pads where none is yet
    log_probs_BT: jax.Array  # of the new tokens, before penalty and filters
    seen_BV: jax.Array  # tokens of prompt and continuation, for the repetition penalty
    ended_B: jax.Array
    count: jax.Array  # new tokens so far


@struct.dataclass
class TokenByToken:
    """Greedy choice or sampling: one token a row and step, never taken back."""

    choose: Greedy | Sample
    penalty: RepetitionPenalty = RepetitionPenalty(1.0)
    rows_per_prompt: int = struct.field(pytree_node=False, default=1)  # texts for each prompt

    def begin(
        self,
        decoder: Decoder,
        context: Context,
        state: Any,
        *,
        ending: Ending,
        max_new_tokens: int,
    ) -> Progress:
        """The first token after a prompt."""
        logits_BV = decoder.head(context.hidden_BLD[:, -1])
        shape_BT = (len(logits_BV), max_new_tokens)
        progress = Progress(
            state=state,
            tokens_BT=jnp.full(shape_BT, ending.pad, jnp.int32),
            log_probs_BT=jnp.zeros(shape_BT, jnp.float32),
            seen_BV=context.seen(logits_BV.shape[1]),
            ended_B=jnp.zeros(len(logits_BV), bool),
            count=jnp.int32(0),
        )
        return self._append(logits_BV, progress, ending)

    def advance(self, decoder: Decoder, progress: Progress, ending: Ending) -> Progress:
        """One more token."""
        newest_B = jax.lax.dynamic_index_in_dim(
            progress.tokens_BT, progress.count - 1, axis=1, keepdims=False
        )
        hidden_BD, state = decoder.step(newest_B, progress.state)
        return self._append(decoder.head(hidden_BD), progress.replace(state=state), ending)

    def finish(self, progress: Progress) -> tuple[jax.Array, jax.Array]:
        """New tokens and their log-probabilities, (B, T) each."""
        return progress.tokens_BT, progress.log_probs_BT

    def _append(self, logits_BV, progress, ending):
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        tokens_B = self.choose(self.penalty(logits_BV, progress.seen_BV), progress.count)
        log_probs_B = jnp.take_along_axis(log_probs_BV, tokens_B[:, None], axis=1)[:, 0]
        tokens_B = jnp.where(progress.ended_B, ending.pad, tokens_B)
        log_probs_B = jnp.where(progress.ended_B, 0.0, log_probs_B)
        return progress.replace(
            tokens_BT=put(progress.tokens_BT, tokens_B, progress.count),
            log_probs_BT=put(progress.log_probs_BT, log_probs_B, progress.count),
            seen_BV=progress.seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True),
            ended_B=progress.ended_B | ending.is_eos(tokens_B),
            count=progress.count + 1,
        )


def continue_until(
    decoder: Decoder, method: Method, progress: Any, ending: Ending, count: jax.Array
) -> Any:
    """Appends tokens until there are `count`, or until all rows have ended."""
    return jax.lax.while_loop(
        lambda progress: (progress.count < count) & ~progress.ended_B.all(),
        lambda progress: method.advance(decoder, progress, ending),
        progress,
    )


def put(x_BT: jax.Array, new_B: jax.Array, column: jax.Array) -> jax.Array:
    """Writes one column."""
    return jax.lax.dynamic_update_slice_in_dim(x_BT, new_B[:, None], column, axis=1)
