"""The generation loop. It takes the model as two functions and knows no tokenizer."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.texts import Ending, Texts


class Decoder(NamedTuple):
    """The model as search methods see it."""

    step: Callable[[jax.Array, Any], tuple[jax.Array, Any]]  # tokens_R, state -> hidden_RD, state
    head: Callable[[jax.Array], jax.Array]  # hidden_RD -> logits_RV, of any leading dimensions
    read_ahead: Callable | None = None  # as the policy's: tokens_RT, state -> hidden, usable, state
    keep: Callable | None = None  # as the policy's: tokens_RT, count, state -> state


class Progress(Protocol):
    """What a method carries from token to token: a pytree of its own, with these fields."""

    texts: Texts
    ended_B: jax.Array  # prompts that need no more tokens


class Method(Protocol):
    """What finds a continuation: token by token, by lookup, by beams, among candidates."""

    rows_per_prompt: int  # rows that the model reads for each prompt
    tokens_ahead: int  # tokens that it reads with the next one, before they are chosen

    def begin(
        self,
        decoder: Decoder,
        context: Context,
        state: Any,
        *,
        ending: Ending,
        max_new_tokens: int,
    ) -> Progress:
        """The carry at the end of a prompt, which `context` holds `rows_per_prompt` times.

        `state` is the policy's.
        """

    def advance(self, decoder: Decoder, progress: Any, ending: Ending) -> Progress:
        """The carry after one more token."""

    def finish(self, progress: Any) -> tuple[jax.Array, jax.Array]:
        """New tokens and their log-probabilities, (rows of the result, T) each."""


def continue_until(
    decoder: Decoder, method: Method, progress: Progress, ending: Ending, count: jax.Array
) -> Progress:
    """Appends tokens until there are `count` or more, or until all prompts have ended."""
    return jax.lax.while_loop(
        lambda progress: (progress.texts.count < count) & ~progress.ended_B.all(),
        lambda progress: method.advance(decoder, progress, ending),
        progress,
    )
