import jax
import jax.numpy as jnp
from flax import struct

MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, or rows without keys become NaN
LEAST_SUM = 1.0  # of exponentials: that of the largest score; without keys all of them are 0


@struct.dataclass
class Visibility:
    """Which keys each query sees: a description, of which an implementation makes what it needs.

    Attributes:
      pad_mask_BK: True at padded keys, which no query sees; None where nothing is padded.
      segment_ids_BL: the document of each query, which sees keys of the same document only.
      segment_ids_BK: the document of each key; both or neither.
      causal: whether the last query sees all keys, and each one before it one key less. All but
        `plain` ask for as many queries as keys.
    """

    pad_mask_BK: jax.Array | None = None
    segment_ids_BL: jax.Array | None = None
    segment_ids_BK: jax.Array | None = None
    causal: bool = struct.field(pytree_node=False, default=False)

    def mask(self, num_queries: int, num_keys: int) -> jax.Array | None:
        """True where a key is visible, (B or 1, L or 1, K); None where all of them are."""
        mask_BLK = None
        if self.causal:
            last_L1 = jnp.arange(num_keys - num_queries, num_keys)[:, None]
            mask_BLK = (jnp.arange(num_keys) <= last_L1)[None]
        if self.pad_mask_BK is not None:
            mask_BLK = _both(mask_BLK, ~self.pad_mask_BK[:, None, :])
        if self.segment_ids_BK is not None:
            same_BLK = self.segment_ids_BL[:, :, None] == self.segment_ids_BK[:, None, :]
            mask_BLK = _both(mask_BLK, same_BLK)
        return mask_BLK

    def of_queries(self, start: int, end: int) -> "Visibility":
        """What queries `start` to before `end` see of the keys before `end`."""
        cut = lambda x, start: None if x is None else x[:, start:end]
        return self.replace(
            pad_mask_BK=cut(self.pad_mask_BK, 0),
            segment_ids_BL=cut(self.segment_ids_BL, start),
            segment_ids_BK=cut(self.segment_ids_BK, 0),
        )

    def hide(self, scores_BNLK: jax.Array) -> jax.Array:
        """The scores, MASK_VALUE at keys that are not visible."""
        mask_BLK = self.mask(*scores_BNLK.shape[2:])
        if mask_BLK is None:
            return scores_BNLK
        return jnp.where(mask_BLK[:, None], scores_BNLK, MASK_VALUE)


def largest_visible(scores_BNLK: jax.Array) -> jax.Array:
    """What the exponents of a softmax are relative to, (B, N, L, 1).

    The largest score; where no key is visible, a number so far above MASK_VALUE that every
    exponential is 0. So such a query gives 0 and has no gradient.
    """
    return jnp.maximum(scores_BNLK.max(axis=-1, keepdims=True), MASK_VALUE / 2)


def _both(a, b):
    return b if a is None else a & b
