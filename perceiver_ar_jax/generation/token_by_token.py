"""Greedy choice and sampling: one token per row and step, never taken back."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder
from perceiver_ar_jax.generation.sampling import Greedy, RepetitionPenalty, Sample
from perceiver_ar_jax.generation.texts import Ending, Texts


@struct.dataclass
class TokenByTokenProgress:
    """What the loop carries from token to token."""

    state: Any  # of the policy
    texts: Texts

    @property
    def ended_B(self) -> jax.Array:
        """Texts that need no more tokens."""
        return self.texts.ended_R


@struct.dataclass
class TokenByToken:
    """Appends what `choose` makes of the logits."""

    choose: Greedy | Sample
    penalty: RepetitionPenalty = RepetitionPenalty(1.0)
    rows_per_prompt: int = struct.field(pytree_node=False, default=1)  # texts for each prompt
    tokens_ahead = 0

    def begin(
        self,
        decoder: Decoder,
        context: Context,
        state: Any,
        *,
        ending: Ending,
        max_new_tokens: int,
    ) -> TokenByTokenProgress:
        """The first token after a prompt."""
        logits_RV = decoder.head(context.hidden_BLD[:, -1])
        texts = Texts.empty(
            context,
            vocab_size=logits_RV.shape[1],
            ending=ending,
            max_new_tokens=max_new_tokens,
        )
        return TokenByTokenProgress(state, self.append(logits_RV, texts, ending))

    def advance(
        self, decoder: Decoder, progress: TokenByTokenProgress, ending: Ending
    ) -> TokenByTokenProgress:
        """One more token."""
        hidden_RD, state = decoder.step(progress.texts.newest_R, progress.state)
        texts = self.append(decoder.head(hidden_RD), progress.texts, ending)
        return TokenByTokenProgress(state, texts)

    def finish(self, progress: TokenByTokenProgress) -> tuple[jax.Array, jax.Array]:
        """New tokens and their log-probabilities, (R, T) each."""
        return progress.texts.tokens_RT, progress.texts.log_probs_RT

    def append(self, logits_RV: jax.Array, texts: Texts, ending: Ending) -> Texts:
        """The texts with what `choose` makes of the logits."""
        tokens_R = self.choose(self.penalty(logits_RV, texts.seen_RV), texts.count)
        log_probs_RV = jax.nn.log_softmax(logits_RV)
        log_probs_R = jnp.take_along_axis(log_probs_RV, tokens_R[:, None], axis=1)[:, 0]
        return texts.append(tokens_R, log_probs_R, ending)
