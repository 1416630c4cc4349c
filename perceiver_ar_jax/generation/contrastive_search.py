"""Contrastive search: likely tokens that lead somewhere new."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.loop import Decoder
from perceiver_ar_jax.generation.sampling import RepetitionPenalty
from perceiver_ar_jax.generation.texts import Ending, Texts


@struct.dataclass
class ContrastiveProgress:
    """What contrastive search carries from token to token."""

    state: Any  # of the policy
    texts: Texts
    logits_BV: jax.Array  # of the next token
    directions_BCD: jax.Array  # hidden states of the latents so far, of unit length
    hidden_mask_BC: jax.Array  # True where there is one

    @property
    def ended_B(self) -> jax.Array:
        """Prompts that need no more tokens."""
        return self.texts.ended_R


@struct.dataclass
class ContrastiveSearch:
    """Of the k likeliest tokens, takes the one whose hidden state is least like earlier ones.

    It maximises (1 - α) × probability - α × the largest cosine with an earlier hidden state; the
    prompt's latents count; its prefix has no hidden states.

    Source: Su et al. 2022 (arXiv 2202.06417); `GenerationMixin._contrastive_search` of
    transformers 4.44.
    """

    top_k: int = struct.field(pytree_node=False)
    penalty_alpha: float
    penalty: RepetitionPenalty = RepetitionPenalty(1.0)
    tokens_ahead = 0

    @property
    def rows_per_prompt(self) -> int:
        """Rows that the model reads for each prompt, not counting candidates."""
        return 1

    def begin(
        self,
        decoder: Decoder,
        context: Context,
        state: Any,
        *,
        ending: Ending,
        max_new_tokens: int,
    ) -> ContrastiveProgress:
        """No token yet: the first one too is chosen among candidates that the model has read."""
        columns = context.hidden_BLD.shape[1]
        logits_BV = decoder.head(context.hidden_BLD[:, -1])
        room = ((0, 0), (0, max_new_tokens), (0, 0))
        prefix_len = context.tokens_BS.shape[1] - columns
        first_B1 = context.cache.pads_B[:, None] - prefix_len
        columns_C = jnp.arange(columns + max_new_tokens)
        return ContrastiveProgress(
            state=state,
            texts=Texts.empty(
                context,
                vocab_size=logits_BV.shape[1],
                ending=ending,
                max_new_tokens=max_new_tokens,
            ),
            logits_BV=logits_BV,
            directions_BCD=jnp.pad(_direction(context.hidden_BLD), room),
            hidden_mask_BC=(columns_C >= first_B1) & (columns_C < columns),
        )

    def advance(
        self, decoder: Decoder, progress: ContrastiveProgress, ending: Ending
    ) -> ContrastiveProgress:
        """One more token: reads all candidates, keeps one."""
        texts = progress.texts
        rows_B = jnp.arange(len(texts.tokens_RT))
        probs_BV = jax.nn.softmax(self.penalty(progress.logits_BV, texts.seen_RV))
        probs_BK, candidates_BK = jax.lax.top_k(probs_BV, self.top_k)
        hidden_RD, state = decoder.step(
            candidates_BK.reshape(-1), progress.state.take(jnp.repeat(rows_B, self.top_k))
        )
        hidden_BKD = hidden_RD.reshape(*candidates_BK.shape, -1)
        direction_BKD = _direction(hidden_BKD)
        cosines_BKC = jnp.einsum("BKD,BCD->BKC", direction_BKD, progress.directions_BCD)
        cosines_BKC = jnp.where(progress.hidden_mask_BC[:, None], cosines_BKC, -jnp.inf)
        alpha = self.penalty_alpha
        chosen_B = ((1 - alpha) * probs_BK - alpha * cosines_BKC.max(axis=-1)).argmax(axis=1)

        tokens_B = candidates_BK[rows_B, chosen_B]
        log_probs_B = jax.nn.log_softmax(progress.logits_BV)[rows_B, tokens_B]
        column = progress.directions_BCD.shape[1] - texts.tokens_RT.shape[1] + texts.count
        return ContrastiveProgress(
            state=state.take(rows_B * self.top_k + chosen_B),
            texts=texts.append(tokens_B, log_probs_B, ending),
            logits_BV=decoder.head(hidden_BKD[rows_B, chosen_B]),
            directions_BCD=progress.directions_BCD.at[:, column].set(
                direction_BKD[rows_B, chosen_B]
            ),
            hidden_mask_BC=progress.hidden_mask_BC.at[:, column].set(True),
        )

    def finish(self, progress: ContrastiveProgress) -> tuple[jax.Array, jax.Array]:
        """New tokens and their log-probabilities, (B, T) each."""
        return progress.texts.tokens_RT, progress.texts.log_probs_RT


def _direction(hidden):
    hidden = hidden.astype(jnp.float32)
    return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)
