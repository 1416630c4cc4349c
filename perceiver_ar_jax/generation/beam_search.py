"""Beam search: the most likely continuation among those that the best beams lead to."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder, Ending
from perceiver_ar_jax.generation.sampling import RepetitionPenalty


@struct.dataclass
class Hypotheses:
    """Texts with their scores, M a prompt."""

    tokens_BMT: jax.Array
    log_probs_BMT: jax.Array
    scores_BM: jax.Array

    def take(self, beams_BM: jax.Array) -> "Hypotheses":
        """Some of each prompt's hypotheses, in that order."""
        rows_B1 = jnp.arange(len(beams_BM))[:, None]
        return jax.tree.map(lambda x: x[rows_B1, beams_BM], self)

    def write(self, tokens_BM: jax.Array, log_probs_BM: jax.Array, count: jax.Array):
        """Appends a token to each."""
        return self.replace(
            tokens_BMT=self.tokens_BMT.at[:, :, count].set(tokens_BM),
            log_probs_BMT=self.log_probs_BMT.at[:, :, count].set(log_probs_BM),
        )

    def best_with(self, others: "Hypotheses") -> "Hypotheses":
        """The M best of both, the best first; earlier ones win ties."""
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, others)
        _, order_BM = jax.lax.top_k(both.scores_BM, self.scores_BM.shape[1])
        return both.take(order_BM)


@struct.dataclass
class BeamProgress:
    """What beam search carries from token to token."""

    state: Any  # of the policy, B × M rows
    beams: Hypotheses  # still open; scores are sums of log-probabilities
    finished: Hypotheses  # scores are -inf where there is none yet
    seen_BMV: jax.Array
    ended_B: jax.Array
    count: jax.Array


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
        empty = Hypotheses(
            tokens_BMT=jnp.full((*shape_BM, max_new_tokens), ending.pad, jnp.int32),
            log_probs_BMT=jnp.zeros((*shape_BM, max_new_tokens), jnp.float32),
            scores_BM=jnp.full(shape_BM, -jnp.inf),
        )
        progress = BeamProgress(
            state=state,
            # All beams are the same text still: the first one alone may be continued.
            beams=empty.replace(scores_BM=jnp.full(shape_BM, -1e9).at[:, 0].set(0.0)),
            finished=empty,
            seen_BMV=context.seen(logits_RV.shape[1]).reshape(*shape_BM, -1),
            ended_B=jnp.zeros(shape_BM[0], bool),
            count=jnp.int32(0),
        )
        return self._extend(logits_RV, progress, ending)

    def advance(self, decoder: Decoder, progress: BeamProgress, ending: Ending) -> BeamProgress:
        """One more token for each open beam."""
        newest_BM = progress.beams.tokens_BMT[:, :, progress.count - 1]
        hidden_RD, state = decoder.step(newest_BM.reshape(-1), progress.state)
        return self._extend(decoder.head(hidden_RD), progress.replace(state=state), ending)

    @jax.jit
    def finish(self, progress: BeamProgress) -> tuple[jax.Array, jax.Array]:
        """The best texts and their log-probabilities, (B × num_return_sequences, T) each."""
        open_BM = self._scores(progress.beams.scores_BM, progress.count)
        open_BM = jnp.where(progress.ended_B[:, None], -jnp.inf, open_BM)
        best = progress.finished.best_with(progress.beams.replace(scores_BM=open_BM))
        texts = (best.tokens_BMT, best.log_probs_BMT)
        return jax.tree.map(
            lambda x: x[:, : self.num_return_sequences].reshape(-1, x.shape[-1]), texts
        )

    def _extend(self, logits_RV, progress, ending):
        beams, count = progress.beams, progress.count
        batch, width = beams.scores_BM.shape
        vocab_size = logits_RV.shape[1]
        log_probs_BMV = jax.nn.log_softmax(logits_RV).reshape(batch, width, vocab_size)
        scores_BMV = self.penalty(log_probs_BMV, progress.seen_BMV)
        scores_BMV = (scores_BMV + beams.scores_BM[..., None]).reshape(batch, -1)
        # As many candidates as it takes to go on with `width` of them whatever else ends.
        num_candidates = width * (1 + len(ending.eos_E))
        scores_BK, flat_BK = jax.lax.top_k(scores_BMV, num_candidates)
        parents_BK, tokens_BK = flat_BK // vocab_size, flat_BK % vocab_size
        log_probs_BK = jnp.take_along_axis(log_probs_BMV.reshape(batch, -1), flat_BK, axis=1)
        is_eos_BK = ending.is_eos(tokens_BK.reshape(-1)).reshape(tokens_BK.shape)

        first_eos = jnp.broadcast_to(ending.eos_E[0], (batch, width))
        ending_BM = is_eos_BK[:, :width] & ~progress.ended_B[:, None]
        ended_scores_BM = self._scores(scores_BK[:, :width], count + 1)
        ended = beams.take(parents_BK[:, :width]).write(first_eos, log_probs_BK[:, :width], count)
        finished = progress.finished.best_with(
            ended.replace(scores_BM=jnp.where(ending_BM, ended_scores_BM, -jnp.inf))
        )

        going_on_BM = jnp.argsort(is_eos_BK, axis=1, stable=True)[:, :width]
        scores_BM, parents_BM, tokens_BM, log_probs_BM = (
            jnp.take_along_axis(x, going_on_BM, axis=1)
            for x in (scores_BK, parents_BK, tokens_BK, log_probs_BK)
        )
        beams = beams.take(parents_BM).write(tokens_BM, log_probs_BM, count)
        rows_B1 = jnp.arange(batch)[:, None]
        seen_BMV = progress.seen_BMV[rows_B1, parents_BM]
        done_B = self._is_done(finished.scores_BM.min(axis=1), scores_BK[:, 0], count + 1)
        return BeamProgress(
            state=progress.state.take((rows_B1 * width + parents_BM).reshape(-1)),
            beams=beams.replace(scores_BM=scores_BM),
            finished=finished,
            seen_BMV=seen_BMV.at[rows_B1, jnp.arange(width), tokens_BM].set(True),
            ended_B=progress.ended_B | done_B,
            count=count + 1,
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
