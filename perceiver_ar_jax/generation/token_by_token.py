"""Greedy choice and sampling: one token per row and step, never taken back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder
from perceiver_ar_jax.generation.sampling import Greedy, RepetitionPenalty, Sample
from perceiver_ar_jax.generation.texts import Ending, Texts


@struct.dataclass
class Alternatives:
    """The A most likely tokens at each place, the likeliest first."""

    ids_RTA: jax.Array
    log_probs_RTA: jax.Array  # before penalty and filters, as those of `Texts`

    @classmethod
    def empty(cls, shape: tuple[int, int, int]) -> "Alternatives":
        """None yet, for (R, T, A)."""
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    def put(self, logits_RV: jax.Array, place: jax.Array) -> "Alternatives":
        """With those of one place."""
        log_probs_RV = jax.nn.log_softmax(logits_RV)
        log_probs_RA, ids_RA = jax.lax.top_k(log_probs_RV, self.ids_RTA.shape[2])
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=1)
        return Alternatives(
            put(self.ids_RTA, ids_RA[:, None]), put(self.log_probs_RTA, log_probs_RA[:, None])
        )


@struct.dataclass
class TokenByTokenProgress:
    """What the loop carries from token to token."""

    state: Any  # of the policy
    texts: Texts
    alternatives: Alternatives | None = None

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
    num_alternatives: int = struct.field(pytree_node=False, default=0)  # to keep of each place
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
        alternatives = None
        if self.num_alternatives:
            shape = (*texts.tokens_RT.shape, self.num_alternatives)
            alternatives = Alternatives.empty(shape).put(logits_RV, texts.count)
        return TokenByTokenProgress(state, self.append(logits_RV, texts, ending), alternatives)

    def advance(
        self, decoder: Decoder, progress: TokenByTokenProgress, ending: Ending
    ) -> TokenByTokenProgress:
        """One more token."""
        hidden_RD, state = decoder.step(progress.texts.newest_R, progress.state)
        logits_RV, alternatives = decoder.head(hidden_RD), progress.alternatives
        if alternatives is not None:
            alternatives = alternatives.put(logits_RV, progress.texts.count)
        texts = self.append(logits_RV, progress.texts, ending)
        return TokenByTokenProgress(state, texts, alternatives)

    def finish(self, progress: TokenByTokenProgress) -> tuple[jax.Array, jax.Array]:
        """New tokens and their log-probabilities, (R, T) each."""
        return progress.texts.tokens_RT, progress.texts.log_probs_RT

    def append(self, logits_RV: jax.Array, texts: Texts, ending: Ending) -> Texts:
        """The texts with what `choose` makes of the logits."""
        tokens_R = self.choose(self.penalty(logits_RV, texts.seen_RV), texts.count)
        log_probs_RV = jax.nn.log_softmax(logits_RV)
        log_probs_R = jnp.take_along_axis(log_probs_RV, tokens_R[:, None], axis=1)[:, 0]
        return texts.append(tokens_R, log_probs_R, ending)
