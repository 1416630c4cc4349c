"""From logits to the next token: filters in Hugging Face's order, greedy choice and sampling.

Filters are pytrees whose numbers are traced, so that another temperature compiles nothing anew.
They keep a token where transformers' warpers of the same name keep it, ties included.

Whatever the logits are, an id of the vocabulary comes out: one at +inf if there is any, 0 if all
are -inf, and any if there are NaNs. The log-probability of a token in such a row is NaN.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class RepetitionPenalty:
    """Makes tokens that were there before less likely. Source: CTRL (arXiv 1909.05858)."""

    penalty: float

    def __call__(self, logits_BV: jax.Array, seen_BV: jax.Array) -> jax.Array:
        """Divides positive and multiplies negative logits of the tokens seen."""
        lower_BV = jnp.where(logits_BV < 0, logits_BV * self.penalty, logits_BV / self.penalty)
        return jnp.where(seen_BV, lower_BV, logits_BV)


@struct.dataclass
class Temperature:
    """Flattens (above 1) or sharpens the distribution."""

    temperature: float

    def __call__(self, logits_BV: jax.Array) -> jax.Array:
        """Divides the logits."""
        return logits_BV / self.temperature


@struct.dataclass
class TopK:
    """Keeps the k most likely tokens, and those as likely as the last of them."""

    k: int = struct.field(pytree_node=False)

    def __call__(self, logits_BV: jax.Array) -> jax.Array:
        """Excluded tokens get -inf."""
        top_BK, _ = jax.lax.top_k(logits_BV, min(self.k, logits_BV.shape[-1]))
        return jnp.where(logits_BV < top_BK[:, -1:], -jnp.inf, logits_BV)


@struct.dataclass
class TopP:
    """Keeps the fewest most likely tokens that hold a share p of the probability.

    Source: nucleus sampling (arXiv 1904.09751).
    """

    p: float

    def __call__(self, logits_BV: jax.Array) -> jax.Array:
        """Excluded tokens get -inf; of equally likely ones the first ids go first."""
        ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
        ascending_BV, order_BV = jax.lax.sort((logits_BV, ids_BV), num_keys=1, is_stable=True)
        below_BV = jnp.cumsum(jax.nn.softmax(ascending_BV), axis=-1) <= 1 - self.p
        first_B1 = jnp.minimum(below_BV.sum(axis=-1, keepdims=True), logits_BV.shape[-1] - 1)
        least_B1 = jnp.take_along_axis(ascending_BV, first_B1, axis=-1)
        least_id_B1 = jnp.take_along_axis(order_BV, first_B1, axis=-1)
        tied_BV = (logits_BV == least_B1) & (ids_BV >= least_id_B1)
        return jnp.where((logits_BV > least_B1) | tied_BV, logits_BV, -jnp.inf)


@struct.dataclass
class MinP:
    """Keeps tokens at least a share p as likely as the most likely one."""

    p: float

    def __call__(self, logits_BV: jax.Array) -> jax.Array:
        """Excluded tokens get -inf."""
        probs_BV = jax.nn.softmax(logits_BV)
        top_B1 = probs_BV.max(axis=-1, keepdims=True)
        return jnp.where(probs_BV < self.p * top_B1, -jnp.inf, logits_BV)


@struct.dataclass
class Greedy:
    """Takes the most likely token, the first of equals."""

    def __call__(self, logits_BV: jax.Array, count: jax.Array) -> jax.Array:
        """Token ids (B,); the same for any count of tokens before."""
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


@struct.dataclass
class Sample:
    """Draws from the filtered distribution, each row with its own key.

    So what a row draws does not depend on the other rows or on their number.
    """

    filters: tuple[Temperature | TopK | TopP | MinP, ...]
    key: jax.Array  # one per row, or a single one: then row i draws with fold_in(key, i)

    def __call__(self, logits_BV: jax.Array, count: jax.Array) -> jax.Array:
        """Token ids (B,), a function of the rows' keys and the count of tokens before."""

        def draw(key, logits_V):
            return jax.random.categorical(jax.random.fold_in(key, count), logits_V)

        keys_B = self._keys(len(logits_BV))
        return jax.vmap(draw)(keys_B, self.filtered(logits_BV)).astype(jnp.int32)

    def filtered(self, logits_BV: jax.Array) -> jax.Array:
        """The logits with each filter applied in turn."""
        for keep in self.filters:
            logits_BV = keep(logits_BV)
        return logits_BV

    def _keys(self, num_rows):
        if self.key.ndim:
            return self.key
        return jax.vmap(jax.random.fold_in, (None, 0))(self.key, jnp.arange(num_rows))
