import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Dropout:
    """Dropout of attention weights after the softmax; the log-sum-exp stays that of all keys.

    The backward pass draws the same weights again from the key.
    """

    rate: float = struct.field(pytree_node=False)
    key: jax.Array

    def __call__(self, x_BNLK: jax.Array) -> jax.Array:
        """0 where a weight is dropped, x / (1 - rate) elsewhere."""
        keep_BNLK = jax.random.bernoulli(self.key, 1.0 - self.rate, x_BNLK.shape)
        return jnp.where(keep_BNLK, x_BNLK / max(1.0 - self.rate, 1e-9), 0)

    def fold_in(self, index: jax.Array | int) -> "Dropout":
        """Another draw for each index: of a group of heads, of a device."""
        return self.replace(key=jax.random.fold_in(self.key, index))
