"""Parameters as decoding reads them: laid out for a few positions at a time, perhaps quantised.

A prepared tree has the same keys as the parameters it was made from. Kernels, and the token
embedding, are values of a type of their own, which the layer that reads them recognises.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.model.attention.cached import SUBLANES
from perceiver_ar_jax.model.quantisation import quantised

WEIGHTS = ("float32", "bfloat16", "int8")


@struct.dataclass
class DecodingKernel:
    """A linear map from D to F channels, one row per output.

    In int8 each row has a scale, and a product quantises its inputs too, one scale per position:
    XLA on CPU multiplies integers fast only by integers.
    """

    rows_FD: jax.Array  # float32, bfloat16 or int8
    scale_F: jax.Array | None = None  # what 1 stands for in each row of int8

    @classmethod
    def of(cls, rows_FD: jax.Array, weights: str) -> "DecodingKernel":
        """The map with these rows, its weights in one of `WEIGHTS`."""
        if weights != "int8":
            return cls(rows_FD.astype(weights))
        rows_FD, scale_F1 = quantised(rows_FD)
        return cls(rows_FD, scale_F1[:, 0])

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows_FD)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., D) to (..., F) in float32."""
        if self.scale_F is None:
            return _product(x.astype(self.rows_FD.dtype), self.rows_FD)
        x, scale = quantised(x)
        return _product(x, self.rows_FD).astype(jnp.float32) * scale * self.scale_F

    def take(self, indices: jax.Array) -> jax.Array:
        """Rows of the map in float32, as an embedding has them: (..., D)."""
        rows = self.rows_FD[indices].astype(jnp.float32)
        return rows if self.scale_F is None else rows * self.scale_F[indices][..., None]


def prepare_for_decoding(params: Mapping[str, Any], weights: str = "float32") -> dict[str, Any]:
    """The tree that decoding reads, for `generate` and `model.apply`; not for training.

    Kernels and the token embedding become `weights`: "float32", "bfloat16" or "int8". The other
    parameters stay as they are. A tree that was prepared for the same weights is returned as it is.

    Raises:
      ValueError: weights of another kind, or a tree prepared for others.
    """
    check_weights(weights)
    prepared = params["token_embedding"]["embedding"]
    if isinstance(prepared, DecodingKernel):
        found = prepared.rows_FD.dtype.name
        if found != weights:
            raise ValueError(f"these parameters are {found} already: load them again as {weights}")
        return params
    embedding = {"embedding": _prepared_embedding(prepared, weights=weights)}
    return _prepared(params, weights) | {"token_embedding": embedding}


def check_weights(weights: str) -> None:
    """Raises ValueError unless it is one of `WEIGHTS`."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")


def _prepared(params, weights):
    if not isinstance(params, Mapping):
        return params
    return {
        name: _prepared_kernel(value, weights=weights)
        if name == "kernel"
        else _prepared(value, weights)
        for name, value in params.items()
    }


@functools.partial(jax.jit, static_argnames="weights")
def _prepared_kernel(kernel_DF, *, weights):
    return DecodingKernel.of(kernel_DF.T, weights)


@functools.partial(jax.jit, static_argnames="weights")
def _prepared_embedding(embedding_VD, *, weights):
    return DecodingKernel.of(embedding_VD, weights)


def _product(x, rows_FD):
    """(..., F), int32 of int8 and otherwise float32."""
    return jax.lax.platform_dependent(
        x, rows_FD, cpu=_product_on_cpu, tpu=_product_on_tpu, default=_contract_last_dimensions
    )


def _product_on_tpu(x, rows_FD):
    x_RD = x.reshape(-1, x.shape[-1])
    rows = len(x_RD)
    if rows < SUBLANES:  # the compiler would leave one row to the vector units
        x_RD = jax.lax.optimization_barrier(jnp.pad(x_RD, ((0, SUBLANES - rows), (0, 0))))
    y_RF = _contract_last_dimensions(x_RD, rows_FD)
    if rows < SUBLANES:
        y_RF = jax.lax.optimization_barrier(y_RF)[:rows]
    return y_RF.reshape(*x.shape[:-1], -1)


def _product_on_cpu(x, rows_FD):
    x_RD = x.reshape(-1, x.shape[-1])  # positions of all rows of the batch
    if len(x_RD) > 64 or (len(x_RD) == 1 and x.dtype == jnp.float32):
        y_RF = _contract_last_dimensions(x_RD, rows_FD)
    else:
        # One row of bf16 or int8 is ten times slower than two.
        two_RD = jnp.repeat(x_RD, 2, axis=0) if len(x_RD) == 1 else x_RD
        y_RF = _weights_on_the_left(two_RD, rows_FD)[: len(x_RD)]
    return y_RF.reshape(*x.shape[:-1], -1)


def _weights_on_the_left(x_RD, rows_FD):
    # XLA copies what is on the right into another layout, at every step. On the left it reads the
    # weights in place: 1.3 to 2 times faster up to 64 rows. Without the barrier it would swap the
    # sides to save the transposition.
    return jax.lax.optimization_barrier(_contract_last_dimensions(rows_FD, x_RD)).T


def _contract_last_dimensions(a, b):
    last = ((a.ndim - 1,), (b.ndim - 1,))
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, (last, ((), ())), preferred_element_type=kind)
