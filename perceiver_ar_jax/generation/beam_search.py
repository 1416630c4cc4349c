"""Beam search: the most likely continuation among those that the best beams lead to."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder
from perceiver_ar_jax.generation.sampling import RepetitionPenalty
from perceiver_ar_jax.generation.texts import Ending, Texts


@struct.dataclass
class Hypotheses:
    """Texts with their scores, M per prompt."""

    tokens_BMT: jax.Array
    log_probs_BMT: jax.Array
    scores_BM: jax.Array

    @classmethod
    def of(cls, texts: Texts, scores_BM: jax.Array) -> "Hypotheses":
        """Texts of B × M rows, scored."""
        shape = (*scores_BM.shape, -1)
        return cls(texts.tokens_RT.reshape(shape), texts.log_probs_RT.reshape(shape), scores_BM)

    def best_with(self, others: "Hypotheses") -> "Hypotheses":
        """The M best of both, the best first; earlier ones win ties."""
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, others)
        _, order_BM = jax.lax.top_k(both.scores_BM, self.scores_BM.shape[1])
        rows_B1 = jnp.arange(len(order_BM))[:, None]
        return jax.tree.map(lambda x: x[rows_B1, order_BM], both)


@struct.dataclass
class BeamProgress:
    """What beam search carries from token to token."""

    state: Any  # of the policy, B × M rows
    texts: Texts  # the open beams, B × M rows
    scores_BM: jax.Array  # sums of their log-probabilities
    finished: Hypotheses  # scores are -inf where there is none yet
    ended_B: jax.Array


@struct.dataclass
class BeamSearch:
    """Keeps the `num_beams` most likely texts of each prompt, and the best that ended.

    A text that ended scores its log-probability / length ** length_penalty. A prompt is done with
    `num_beams` ended texts if early_stopping is True; if False, when the best open beam would
    score no better were it to end now; if "never", when it can no longer do so at any length.

    Source: `GenerationMixin._beam_search` and `BeamSearchScorer` of transformers 4.44.
    """

    num_beams: int = struct.field(pytree_node=False)
    num_return_sequences: int = struct.field(pytree_node=False)
    early_stopping: bool | str = struct.field(pytree_node=False)
    length_penalty: float
    max_new_tokens: int
    penalty: RepetitionPenalty = RepetitionPenalty(1.0)
    tokens_ahead = 0

    @property
    def rows_per_prompt(self) -> int:
        """Rows that the model reads for each prompt."""
        return self.num_beams

    def begin(
        self,
        decoder: Decoder,
        context: Context,
        state: Any,
        *,
        ending: Ending,
        max_new_tokens: int,
    ) -> BeamProgress:
        """The first tokens; `context` holds each prompt `num_beams` times in a row."""
        logits_RV = decoder.head(context.hidden_BLD[:, -1])
        shape_BM = (len(logits_RV) // self.num_beams, self.num_beams)
        texts = Texts.empty(
            context,
            vocab_size=logits_RV.shape[1],
            ending=ending,
            max_new_tokens=max_new_tokens,
        )
        progress = BeamProgress(
            state=state,
            texts=texts,
            # All beams are still the same text, so only the first one is continued.
            scores_BM=jnp.full(shape_BM, -1e9).at[:, 0].set(0.0),
            finished=Hypotheses.of(texts, jnp.full(shape_BM, -jnp.inf)),
            ended_B=jnp.zeros(shape_BM[0], bool),
        )
        return self._extend(logits_RV, progress, ending)

    def advance(self, decoder: Decoder, progress: BeamProgress, ending: Ending) -> BeamProgress:
        """One more token for each open beam."""
        hidden_RD, state = decoder.step(progress.texts.newest_R, progress.state)
        return self._extend(decoder.head(hidden_RD), progress.replace(state=state), ending)

    @jax.jit
    def finish(self, progress: BeamProgress) -> tuple[jax.Array, jax.Array]:
        """The best texts and their log-probabilities, (B × num_return_sequences, T) each."""
        open_BM = self._scores(progress.scores_BM, progress.texts.count)
        open_BM = jnp.where(progress.ended_B[:, None], -jnp.inf, open_BM)
        best = progress.finished.best_with(Hypotheses.of(progress.texts, open_BM))
        return jax.tree.map(
            lambda x: x[:, : self.num_return_sequences].reshape(-1, x.shape[-1]),
            (best.tokens_BMT, best.log_probs_BMT),
        )

    def _extend(self, logits_RV, progress, ending):
        texts, count = progress.texts, progress.texts.count
        batch, width = progress.scores_BM.shape
        vocab_size = logits_RV.shape[1]
        log_probs_RV = jax.nn.log_softmax(logits_RV)
        scores_BMV = self.penalty(log_probs_RV, texts.seen_RV).reshape(batch, width, vocab_size)
        scores_BMV = (scores_BMV + progress.scores_BM[..., None]).reshape(batch, -1)
        # As many candidates as it takes to go on with `width` of them, whichever of them end.
        scores_BK, flat_BK = jax.lax.top_k(scores_BMV, width * (1 + len(ending.eos_E)))
        log_probs_BK = jnp.take_along_axis(log_probs_RV.reshape(batch, -1), flat_BK, axis=1)
        parents_BK = jnp.arange(batch)[:, None] * width + flat_BK // vocab_size  # rows of `texts`
        tokens_BK = flat_BK % vocab_size
        is_eos_BK = ending.is_eos(tokens_BK)

        ending_BM = is_eos_BK[:, :width] & ~progress.ended_B[:, None]
        ended_scores_BM = self._scores(scores_BK[:, :width], count + 1)
        first_eos_R = jnp.broadcast_to(ending.eos_E[0], batch * width)
        ended = texts.take(parents_BK[:, :width].reshape(-1)).append(
            first_eos_R, log_probs_BK[:, :width].reshape(-1), ending
        )
        finished = progress.finished.best_with(
            Hypotheses.of(ended, jnp.where(ending_BM, ended_scores_BM, -jnp.inf))
        )

        going_on_BM = jnp.argsort(is_eos_BK, axis=1, stable=True)[:, :width]
        scores_BM, parents_BM, tokens_BM, log_probs_BM = (
            jnp.take_along_axis(x, going_on_BM, axis=1)
            for x in (scores_BK, parents_BK, tokens_BK, log_probs_BK)
        )
        parents_R = parents_BM.reshape(-1)
        done_B = self._is_done(finished.scores_BM.min(axis=1), scores_BK[:, 0], count + 1)
        return BeamProgress(
            state=progress.state.take(parents_R),
            texts=texts.take(parents_R).append(
                tokens_BM.reshape(-1), log_probs_BM.reshape(-1), ending
            ),
            scores_BM=scores_BM,
            finished=finished,
            ended_B=progress.ended_B | done_B,
        )

    def _scores(self, log_probs, length):
        return log_probs / length.astype(jnp.float32) ** self.length_penalty

    def _is_done(self, worst_B, best_open_B, length):
        if self.early_stopping is True:
            return worst_B > -jnp.inf
        if self.early_stopping == "never":
            longest = jnp.asarray(self.max_new_tokens)
            length = jnp.where(self.length_penalty > 0.0, longest, length)
        return worst_B >= self._scores(best_open_B, length)
