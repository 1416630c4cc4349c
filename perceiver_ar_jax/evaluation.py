"""How well a model predicts a text: nats per token and bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.parallel import one_at_a_time
from perceiver_ar_jax.training import Batch, eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss over a text."""

    loss: float  # nats per token
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """All nats as bits, over the UTF-8 bytes of the text: comparable across tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes


def evaluate(
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    model: PerceiverAR,
    prefix_len: int,
    num_bytes: int,
    to_device: Callable[[Any], Any] = lambda x: x,
) -> Evaluation:
    """The mean loss over the positions that `weights` counts.

    Args:
      params: of the model.
      batches: dicts of `tokens`, `targets`, `pad_mask`, `weights` and, if documents are to be
        respected, `segment_ids`, (B, S) each; see `data.evaluation_batches`.
      model: the model.
      prefix_len: positions of a window that are prefix.
      num_bytes: UTF-8 bytes of the text that the batches cover.
      to_device: places a batch, as `parallel.to_global` does on a mesh.
    """
    step = _compiled_step(model, prefix_len)
    batches = (to_device(Batch(**arrays)) for arrays in batches)
    sums = list(one_at_a_time(functools.partial(step, params), batches))
    if not sums:
        raise ValueError("there is no text to evaluate on")
    nats, tokens = np.sum(sums, axis=0, dtype=np.float64)
    return Evaluation(loss=nats / tokens, num_tokens=round(tokens), num_bytes=num_bytes)


@functools.cache
def _compiled_step(model, prefix_len):
    return jax.jit(functools.partial(eval_step, model=model, prefix_len=prefix_len))
