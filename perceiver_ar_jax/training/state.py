import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from perceiver_ar_jax.model import PARAMETER_RULES
from perceiver_ar_jax.parallel import shardings_by_path
from perceiver_ar_jax.training.spikes import SPIKE_RULES

Array = jax.Array | np.ndarray  # placed on devices, or as the loader gives it


@struct.dataclass
class Batch:
    """One batch of left-padded windows; the keywords are the names of the loader's arrays."""

    tokens: Array  # (B, S) int32
    targets: Array  # (B, S) int32, the next token at each position
    pad_mask: Array  # (B, S) bool, True at pads
    segment_ids: Array | None = None  # (B, S) int32; None: attention crosses documents
    weights: Array | None = None  # (B, S) float32, of each target; None: 1, and 0 at pads

    def latent_weights(self, prefix_len: int) -> jax.Array:
        """The weight of each latent's target, (B, L) float32."""
        weights_BS = ~self.pad_mask if self.weights is None else self.weights
        return weights_BS[:, prefix_len:].astype(jnp.float32)

    @classmethod
    def abstract(cls, batch_size: int, length: int, *, with_segment_ids: bool) -> "Batch":
        """Shapes and dtypes of the loader's batches, to compile for."""
        rows = functools.partial(jax.ShapeDtypeStruct, (batch_size, length))
        return cls(
            tokens=rows(jnp.int32),
            targets=rows(jnp.int32),
            pad_mask=rows(jnp.bool_),
            segment_ids=rows(jnp.int32) if with_segment_ids else None,
            weights=rows(jnp.float32),
        )


@struct.dataclass
class TrainState:
    """Everything that a training step changes."""

    step: jax.Array  # int32 scalar, steps taken
    params: Any
    opt_state: optax.OptState
    ema_params: Any | None  # a running average of the parameters, or None
    tx: optax.GradientTransformation = struct.field(pytree_node=False)
    ema_decay: float = struct.field(pytree_node=False)

    @classmethod
    def create(
        cls, *, params: Any, tx: optax.GradientTransformation, ema_decay: float = 0.0
    ) -> "TrainState":
        """The state before the first step; with `ema_decay` 0 no average is kept."""
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
        """The parameters to evaluate and sample with: the averaged ones, if there are any."""
        return self.params if self.ema_params is None else self.ema_params


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a train state, or of its shapes; moments as their parameters.

    Raises:
      ValueError: if no rule covers a leaf, or a dimension does not divide among its devices.
    """
    return shardings_by_path(state, mesh, (*PARAMETER_RULES, *SPIKE_RULES))
