from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class Batch:
    """One batch of left-padded windows."""

    tokens: jax.Array  # (B, S) int32
    targets: jax.Array  # (B, S) int32, the next token at each position
    pad_mask: jax.Array  # (B, S) bool, True at pads
    segment_ids: jax.Array | None = None  # (B, S) int32: None lets attention cross documents


@struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar, steps taken
    params: Any
    opt_state: optax.OptState
    tx: optax.GradientTransformation = struct.field(pytree_node=False)

    @classmethod
    def create(cls, *, params: Any, tx: optax.GradientTransformation) -> "TrainState":
        """The state before the first step."""
        return cls(step=jnp.int32(0), params=params, opt_state=tx.init(params), tx=tx)
