"""A prompt that the model has read, to be continued any number of times; also in a file."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.generation.policies import Context
from perceiver_ar_jax.model.cache import Cache, LayerCache


class Prefilled(NamedTuple):
    """What `prefill` returns and `generate` continues."""

    tokens_BS: np.ndarray
    pad_mask_BS: np.ndarray
    context: Context
    fingerprint: jax.Array  # of the parameters that read the prompt

    def check(self, config: PerceiverARConfig, params: Any) -> None:
        """Raises ValueError where another model has read the prompt."""
        keys = self.context.cache.cross.k.shape[-3:-1]
        read_by = (len(self.context.cache.layers), *keys)
        asked = (config.num_self_attention_layers, config.num_heads, config.head_dim)
        if read_by != asked:
            raise ValueError(
                f"a model with {read_by} layers, heads and channels a head has read this prompt; "
                f"the one that is to continue it has {asked}"
            )
        columns, latents = self.context.tokens_BS.shape[1], self.context.hidden_BLD.shape[1]
        if columns > config.max_seq_len or latents > config.max_latents:
            raise ValueError(
                f"this prompt was read as {columns} columns, {latents} of them latents; the model "
                f"that is to continue it has at most {config.max_seq_len} and {config.max_latents}"
            )
        if int(self.fingerprint) != int(jax.jit(fingerprint)(params)):
            raise ValueError(
                "a model with other parameters has read this prompt: prefill it again with these"
            )


def fingerprint(params: Any) -> jax.Array:
    """A number that other parameters hardly share, from a few elements of each array."""
    total = jnp.uint32(0)
    for x in jax.tree.leaves(params):
        few = x[(slice(0, 1),) * (x.ndim - 1) + (slice(0, 16),)].astype(jnp.float32)
        total = total * 31 + jax.lax.bitcast_convert_type(few, jnp.uint32).sum()
    return total


def save_prefilled(path: str | os.PathLike, prefilled: Prefilled) -> None:
    """Writes a prompt and what the model made of it to a file, bit for bit."""
    Path(path).write_bytes(serialization.to_bytes(prefilled))


def load_prefilled(path: str | os.PathLike) -> Prefilled:
    """Reads what `save_prefilled` wrote.

    Raises:
      ValueError: if the file holds something else.
    """
    try:
        state = serialization.msgpack_restore(Path(path).read_bytes())
        layers = (LayerCache(None, None),) * len(state["context"]["cache"]["layers"])
        cache = Cache(LayerCache(None, None), layers, None, None, None)
        empty = Prefilled(None, None, Context(None, None, cache), None)
        return serialization.from_state_dict(empty, state)
    except OSError:
        raise
    except Exception as error:  # msgpack raises many kinds
        raise ValueError(f"{path} holds no prefilled prompt ({error})") from error
