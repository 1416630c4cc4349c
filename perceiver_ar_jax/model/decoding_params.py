"""Parameters as decoding reads them: laid out for a few positions at a time.

A prepared tree has the same keys as the parameters it was made from. Some leaves are replaced by
values of a type of their own, which the layer that reads them recognises.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from perceiver_ar_jax.config import PerceiverARConfig


@struct.dataclass
class TiedEmbedding:
    """The token embedding in the two layouts of its two uses.

    XLA's matrix × vector on CPU is eight times slower where the head reads the rows.
    """

    embedding_VD: jax.Array  # rows to look up
    head_DV: jax.Array  # the same, transposed, in the dtype of the computation


def prepare_for_decoding(params: Mapping[str, Any], config: PerceiverARConfig) -> dict[str, Any]:
    """The tree that decoding reads; a prepared tree is returned as it is.

    `generate` prepares what is not: prepare parameters that are used several times. It takes the
    memory of a second token embedding.
    """
    embedding = params["token_embedding"]["embedding"]
    if isinstance(embedding, TiedEmbedding):
        return params
    head_DV = _transposed(embedding, dtype=config.dtype)
    return {**params, "token_embedding": {"embedding": TiedEmbedding(embedding, head_DV)}}


@functools.partial(jax.jit, static_argnames="dtype")
def _transposed(embedding_VD, *, dtype):
    return jnp.asarray(embedding_VD, dtype).T
