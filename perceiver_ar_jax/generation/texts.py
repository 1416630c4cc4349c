"""The core of every search method: the texts it writes, one per row that the model reads."""

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.generation.context import Context


@struct.dataclass
class Ending:
    """What ends a text, and what follows its end."""

    eos_E: jax.Array
    pad: jax.Array

    def is_eos(self, tokens: jax.Array) -> jax.Array:
        """True where a token ends a text; of the same shape as `tokens`."""
        return (tokens[..., None] == self.eos_E).any(axis=-1)


@struct.dataclass
class Texts:
    """New tokens of R rows, and which tokens each row has had."""

    tokens_RT: jax.Array  # pads from `count` on
    log_probs_RT: jax.Array  # of the tokens, before penalty and filters; 0 from `count` on
    seen_RV: jax.Array  # tokens of prompt and continuation, for the repetition penalty
    ended_R: jax.Array
    count: jax.Array  # new tokens so far

    @classmethod
    def empty(
        cls, context: Context, *, vocab_size: int, ending: Ending, max_new_tokens: int
    ) -> "Texts":
        """The prompts of `context` with no new tokens yet."""
        num_rows = len(context.tokens_BS)
        return cls(
            tokens_RT=jnp.full((num_rows, max_new_tokens), ending.pad, jnp.int32),
            log_probs_RT=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
            seen_RV=context.seen(vocab_size),
            ended_R=jnp.zeros(num_rows, bool),
            count=jnp.int32(0),
        )

    @property
    def newest_R(self) -> jax.Array:
        """The last token of each row."""
        return jax.lax.dynamic_index_in_dim(self.tokens_RT, self.count - 1, 1, keepdims=False)

    def append(self, tokens_R: jax.Array, log_probs_R: jax.Array, ending: Ending) -> "Texts":
        """One more token per row; a pad where the row has ended."""
        tokens_R = jnp.where(self.ended_R, ending.pad, tokens_R)
        log_probs_R = jnp.where(self.ended_R, 0.0, log_probs_R)
        return Texts(
            tokens_RT=_put(self.tokens_RT, tokens_R, self.count),
            log_probs_RT=_put(self.log_probs_RT, log_probs_R, self.count),
            seen_RV=self.seen_RV.at[jnp.arange(len(tokens_R)), tokens_R].set(True),
            ended_R=self.ended_R | ending.is_eos(tokens_R),
            count=self.count + 1,
        )

    def take(self, rows_R: jax.Array) -> "Texts":
        """The texts of some rows, in that order, possibly several times."""
        return self.replace(
            tokens_RT=self.tokens_RT[rows_R],
            log_probs_RT=self.log_probs_RT[rows_R],
            seen_RV=self.seen_RV[rows_R],
            ended_R=self.ended_R[rows_R],
        )


def _put(x_RT, new_R, column):
    return jax.lax.dynamic_update_slice_in_dim(x_RT, new_R[:, None], column, axis=1)
