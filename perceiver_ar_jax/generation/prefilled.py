"""A prompt to be continued any number of times: read once by `prefill`, also kept in a file."""

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.generation import prompt as prompts
from perceiver_ar_jax.generation.context import Context, fingerprint, mesh_of, read_prompt
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.model.cache import Cache, LayerCache


class Prefilled(NamedTuple):
    """What `prefill` returns and `generate` continues."""

    tokens_BS: np.ndarray
    pad_mask_BS: np.ndarray
    context: Context
    fingerprint: jax.Array  # of the parameters that read the prompt

    def check(self, config: PerceiverARConfig, params: Any) -> None:
        """Raises ValueError where another model has read the prompt; `params` are prepared."""
        keys = self.context.cache.cross.k.shape[-3:-1]
        read_by = (len(self.context.cache.layers), *keys)
        asked = (config.num_self_attention_layers, config.num_heads, config.head_dim)
        if read_by != asked:
            raise ValueError(
                f"a model with {read_by} layers, heads and channels per head has read this prompt; "
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


def prefill(
    model: PerceiverAR,
    params: Any,
    prompt: np.ndarray | Sequence[Sequence[int]],
    *,
    num_latents: int = 1,
    pad_mask: np.ndarray | None = None,
) -> Prefilled:
    """Reads a prompt once, to be continued many times; arguments as in `generate`."""
    check_model(model, params)
    try:
        num_latents = operator.index(num_latents)
    except TypeError:
        raise ValueError(f"num_latents must be a whole number, not {num_latents!r}") from None
    tokens_BS, pad_mask_BS = prompts.as_rows(prompt, pad_mask)
    prompts.check(tokens_BS, pad_mask_BS, num_latents, model.config)
    *padded, prefix_len = prompts.in_bucket(tokens_BS, pad_mask_BS, num_latents, model.config)
    with mesh_of(params):
        context, weights = read_prompt(params, *padded, prefix_len=prefix_len, model=model)
    return Prefilled(tokens_BS, pad_mask_BS, context, weights)


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
        raise ValueError(f"{path} does not hold a prefilled prompt ({error})") from error


def check_model(model: PerceiverAR, params: Any) -> None:
    """Raises ValueError where these are not a model and its parameters."""
    if isinstance(params, PerceiverAR):
        raise ValueError("model and params are swapped: generate(model, params, prompt)")
    if not isinstance(model, PerceiverAR):
        raise ValueError(
            f"model must be a PerceiverAR, not {type(model).__name__}: "
            "generate(model, params, prompt)"
        )
    if "token_embedding" not in params:
        raise ValueError(
            "params must be the parameters of a PerceiverAR, such as "
            f'model.init(...)["params"]; these have {", ".join(map(str, params))}'
        )
