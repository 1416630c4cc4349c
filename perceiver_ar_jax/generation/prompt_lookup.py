"""Prompt lookup: guesses that a text goes on as it did before, and reads several tokens at once."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder
from perceiver_ar_jax.generation.texts import Ending, Texts
from perceiver_ar_jax.generation.token_by_token import TokenByToken, TokenByTokenProgress

# A pass that checks several tokens takes longer than one of a single token: up to twice as long on
# a CPU. So it is worth it where the first of them is right more often than not.
WORTH_A_GUESS = 0.6
LONGEST_MATCH = 8  # tokens; longer ones are as good
LEARNING_RATE = 0.1


@struct.dataclass
class PromptLookupProgress:
    """What the loop carries from pass to pass."""

    state: Any  # of the policy
    texts: Texts
    prompt_RS: jax.Array
    pads_R: jax.Array
    right_RM: jax.Array  # how often the first token guessed was right, by length of the match

    @property
    def ended_B(self) -> jax.Array:
        """Texts that need no more tokens."""
        return self.texts.ended_R


@struct.dataclass
class PromptLookup:
    """Gives the tokens of `token_by_token`, several per pass where the text repeats itself.

    The longest stretch of last tokens that was there before is looked up in prompt and
    continuation; what followed it there is the guess. One pass reads it, and the tokens up to the
    first wrong one are kept. So greedy texts stay what they were; sampled ones too, as each token
    is drawn with the key of its place. Matches of a length that mostly led to wrong tokens in this
    text are not followed. Rows of a batch move together: it keeps what all of them guessed right.

    Source: prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); the check of
    guesses is that of speculative decoding (arXiv 2211.17192) for guesses without probabilities.
    """

    token_by_token: TokenByToken
    tokens_ahead: int = struct.field(pytree_node=False)  # guessed at a time
    threshold: float = struct.field(pytree_node=False, default=WORTH_A_GUESS)

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
        right_RM = jnp.full((len(context.tokens_BS), LONGEST_MATCH), WORTH_A_GUESS)
        return PromptLookupProgress(
            first.state, first.texts, context.tokens_BS, context.cache.pads_B, right_RM
        )

    def advance(
        self, decoder: Decoder, progress: PromptLookupProgress, ending: Ending
    ) -> PromptLookupProgress:
        """One more token, or several."""
        texts = progress.texts
        text_RS = jnp.concatenate([progress.prompt_RS, texts.tokens_RT], axis=1)
        length = progress.prompt_RS.shape[1] + texts.count
        guesses_RT, matched_R = look_up(
            text_RS, length, progress.pads_R, num_tokens=self.tokens_ahead
        )
        of_match_R = jnp.arange(len(matched_R)), matched_R - 1
        has_guess_R = matched_R > 0
        right_R = jnp.where(has_guess_R, progress.right_RM[of_match_R], 0)

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

        guesses = jnp.where(texts.ended_R, 1, right_R).prod() >= self.threshold
        progress = _run_if(guesses, several, progress)
        progress = _run_if(~guesses, one_token, progress)
        is_right_R = progress.texts.tokens_RT[:, texts.count] == guesses_RT[:, 0]
        change_R = jnp.where(has_guess_R, LEARNING_RATE * (is_right_R - right_R), 0)
        return progress.replace(right_RM=progress.right_RM.at[of_match_R].add(change_R))

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
    text_RS: jax.Array, length: jax.Array, pads_R: jax.Array, *, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """What followed an earlier occurrence of the last tokens, (R, num_tokens).

    Of the longest match, and of equally long ones the newest. Where what followed reaches the end
    of the text, it goes on as the text between both occurrences does.

    Args:
      text_RS: texts, with room behind.
      length: columns written, the same in all rows.
      pads_R: pads at the beginning of each row.
      num_tokens: how many to give.

    Returns:
      The tokens, and how many last tokens have occurred before, (R,): 0 to LONGEST_MATCH.
    """
    size = text_RS.shape[1]
    columns_S = jnp.arange(size)
    matches_RS = columns_S < length - 1
    matched_RS = jnp.zeros_like(text_RS)
    for back in range(LONGEST_MATCH):
        last_R1 = jax.lax.dynamic_slice_in_dim(text_RS, length - 1 - back, 1, axis=1)
        is_text_RS = columns_S >= pads_R[:, None] + back
        matches_RS = matches_RS & is_text_RS & (jnp.roll(text_RS, back, axis=1) == last_R1)
        matched_RS += matches_RS
    best_R1 = (matched_RS * size + columns_S).max(axis=1, keepdims=True)
    matched_R1, end_R1 = jnp.divmod(best_R1, size)
    period_R1 = jnp.maximum(length - 1 - end_R1, 1)
    columns_RT = end_R1 + 1 + jnp.arange(num_tokens) % period_R1
    return jnp.take_along_axis(text_RS, columns_RT, axis=1), matched_R1[:, 0]
