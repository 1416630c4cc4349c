"""Prompt lookup: guesses that a text goes on as it did before, and reads several tokens at once."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder
from perceiver_ar_jax.generation.texts import Ending, Texts
from perceiver_ar_jax.generation.token_by_token import TokenByToken, TokenByTokenProgress


@struct.dataclass
class PromptLookupProgress:
    """What the loop carries from pass to pass."""

    state: Any  # of the policy
    texts: Texts
    prompt_RS: jax.Array
    pads_R: jax.Array

    @property
    def ended_B(self) -> jax.Array:
        """Texts that need no more tokens."""
        return self.texts.ended_R


@struct.dataclass
class PromptLookup:
    """Gives the tokens of `token_by_token`, several per pass where the text repeats itself.

    The last tokens are looked up in prompt and continuation; what followed them there is the guess.
    One pass reads it, and the tokens up to the first wrong one are kept. So greedy texts stay what
    they were; sampled ones too, as each token is drawn with the key of its place. Rows of a batch
    move together: it keeps what all of them guessed right, and guesses only if all have a guess.

    Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); the check of
    guesses is that of speculative decoding (arXiv 2211.17192) for guesses without probabilities.
    """

    token_by_token: TokenByToken
    tokens_ahead: int = struct.field(pytree_node=False)  # guessed at a time
    matched: int = struct.field(pytree_node=False, default=3)  # tokens that must have been there

    @property
    def rows_per_prompt(self) -> int:
        """Texts for each prompt."""
        return self.token_by_token.rows_per_prompt

    def begin(
        self,
        decoder: Decoder,
        context: Context,
        state: Any,
        *,
        ending: Ending,
        max_new_tokens: int,
    ) -> PromptLookupProgress:
        """The first token after a prompt."""
        first = self.token_by_token.begin(
            decoder, context, state, ending=ending, max_new_tokens=max_new_tokens
        )
        return PromptLookupProgress(
            first.state, first.texts, context.tokens_BS, context.cache.pads_B
        )

    def advance(
        self, decoder: Decoder, progress: PromptLookupProgress, ending: Ending
    ) -> PromptLookupProgress:
        """One more token, or several."""
        texts = progress.texts
        text_RS = jnp.concatenate([progress.prompt_RS, texts.tokens_RT], axis=1)
        length = progress.prompt_RS.shape[1] + texts.count
        guesses_RT, has_guess_R = look_up(
            text_RS, length, progress.pads_R, matched=self.matched, num_tokens=self.tokens_ahead
        )

        def one_token(progress):
            one = TokenByTokenProgress(progress.state, progress.texts)
            one = self.token_by_token.advance(decoder, one, ending)
            return progress.replace(state=one.state, texts=one.texts)

        def several(progress):
            tokens_RT = jnp.concatenate([texts.newest_R[:, None], guesses_RT], axis=1)
            hidden_RTD, usable, state = decoder.read_ahead(tokens_RT, progress.state)
            longer, count = self._append_right_ones(
                decoder.head(hidden_RTD), guesses_RT, usable, texts, ending
            )
            return progress.replace(state=decoder.keep(tokens_RT, count, state), texts=longer)

        guessed = (has_guess_R | texts.ended_R).all()
        progress = _run_if(guessed, several, progress)
        return _run_if(~guessed, one_token, progress)

    def finish(self, progress: PromptLookupProgress) -> tuple[jax.Array, jax.Array]:
        """New tokens and their log-probabilities, (R, T) each."""
        return self.token_by_token.finish(progress)

    def _append_right_ones(self, logits_RTV, guesses_RT, usable, texts, ending):
        """Appends a token, and one more for each right guess; the texts, and how many these are."""
        before = texts.count
        goes_on = jnp.bool(True)
        for index in range(logits_RTV.shape[1]):
            longer = self.token_by_token.append(logits_RTV[:, index], texts, ending)
            texts = jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), longer, texts)  # noqa: B023
            if index < guesses_RT.shape[1]:
                right_R = (texts.newest_R == guesses_RT[:, index]) | texts.ended_R
                has_room = texts.count < texts.tokens_RT.shape[1]
                goes_on &= right_R.all() & ~texts.ended_R.all() & has_room & (index + 1 < usable)
        return texts, texts.count - before


def _run_if(condition, step, progress):
    """A conditional as a loop of at most one turn: XLA would copy the caches into a `cond`."""
    return jax.lax.while_loop(
        lambda carry: carry[0],
        lambda carry: (jnp.bool(False), step(carry[1])),
        (condition, progress),
    )[1]


def look_up(
    text_RS: jax.Array, length: jax.Array, pads_R: jax.Array, *, matched: int, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """What followed the newest earlier occurrence of the last tokens, (R, num_tokens).

    Where that reaches the end of the text, it goes on as the text between both occurrences does.

    Args:
      text_RS: texts, with room behind.
      length: columns written, the same in all rows.
      pads_R: pads at the beginning of each row.
      matched: how many last tokens are looked up.
      num_tokens: how many to give.

    Returns:
      The tokens, and whether there is such an occurrence, (R,).
    """
    columns_S = jnp.arange(text_RS.shape[1])
    is_end_RS = (columns_S < length - 1) & (columns_S >= pads_R[:, None] + matched - 1)
    for back in range(matched):
        last_R1 = jax.lax.dynamic_slice_in_dim(text_RS, length - 1 - back, 1, axis=1)
        is_end_RS &= jnp.roll(text_RS, back, axis=1) == last_R1
    end_R1 = jnp.where(is_end_RS, columns_S, -1).max(axis=1, keepdims=True)
    period_R1 = length - 1 - end_R1
    columns_RT = end_R1 + 1 + jnp.arange(num_tokens) % period_R1
    return jnp.take_along_axis(text_RS, columns_RT, axis=1), end_R1[:, 0] >= 0
