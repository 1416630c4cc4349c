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
    ema_params: Any | None  # a running average of the parameters, if one is taken
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    ema_decay: float = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, *, params: Any, tx: optax.GradientTransformation, ema_decay: float = 0.0
    ) -> "TrainState":
        """The state before the first step; `ema_decay` 0 takes no average."""
        return cls(
            step=jnp.int32(0),
            params=params,
            opt_state=tx.init(params),
            ema_params=jax.tree.map(jnp.copy, params) if ema_decay else None,
            tx=tx,
            ema_decay=ema_decay,
        )

    @property
    def inference_params(self) -> Any:
        """What the run is judged by: the averaged parameters, if there are any."""
        return self.params if self.ema_params is None else self.ema_params
