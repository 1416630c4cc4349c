"""How well a model predicts a text: nats per token and bits per byte."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from perceiver_ar_jax.data import EvaluationBatches
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
        """Total bits divided by the UTF-8 bytes of the text; comparable across tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes


def evaluate(
    params: Any,
    batches: EvaluationBatches,
    *,
    model: PerceiverAR,
    to_device: Callable[[Any], Any] = lambda x: x,
) -> Evaluation:
    """The weighted mean loss over a text.

    Args:
      params: parameters of the model.
      batches: from `data.evaluation_batches`.
      model: the model.
      to_device: places a batch, as `parallel.to_global` does on a mesh.

    Raises:
      RuntimeError: a token was not counted exactly once.
    """
    step = functools.partial(_compiled_step(model, batches.prefix_len), params)
    placed = (to_device(Batch(**arrays)) for arrays in batches)
    sums = list(one_at_a_time(step, placed))
    nats, tokens = (math.fsum(map(float, column)) for column in zip(*sums, strict=True))
    if tokens != batches.num_tokens:
        raise RuntimeError(
            f"the weights of all batches add up to {tokens:g}, but the text has "
            f"{batches.num_tokens} tokens: each must be counted once"
        )
    return Evaluation(
        loss=float(nats / tokens), num_tokens=batches.num_tokens, num_bytes=batches.num_bytes
    )


@functools.cache
def _compiled_step(model, prefix_len):
    return jax.jit(functools.partial(eval_step, model=model, prefix_len=prefix_len))
