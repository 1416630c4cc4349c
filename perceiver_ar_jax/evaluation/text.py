"""How well a model predicts a text: nats per token, bits per byte, perplexity of words."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from perceiver_ar_jax.data import EvaluationBatches
from perceiver_ar_jax.model import PerceiverAR
from perceiver_ar_jax.parallel import one_at_a_time
from perceiver_ar_jax.training import Batch, eval_step, token_log_probs

Table = list[dict[str, Any]]  # rows of plain numbers and names


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss over a text."""

    loss: float  # nats per token
    num_tokens: int
    num_bytes: int
    num_words: int  # separated by white space
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)  # see evaluate_in_detail

    @property
    def bits_per_byte(self) -> float:
        """Total bits divided by the UTF-8 bytes of the text; comparable across tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes

    @property
    def word_perplexity(self) -> float:
        """exp(total nats / words); infinite where that overflows or there are no words."""
        try:
            return math.exp(self.loss * self.num_tokens / self.num_words)
        except (OverflowError, ZeroDivisionError):
            return math.inf


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
    step = functools.partial(compiled(eval_step, model, batches.prefix_len), params)
    placed = (to_device(Batch(**arrays)) for arrays in batches)
    sums = list(one_at_a_time(step, placed))
    nats, tokens = (math.fsum(map(float, column)) for column in zip(*sums, strict=True))
    return _evaluation(nats, tokens, batches)


def evaluate_in_detail(
    params: Any,
    batches: EvaluationBatches,
    *,
    model: PerceiverAR,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Evaluation:
    """`evaluate` on one host, with tables of the loss by place.

    `tables` has "by_position", how many tokens of its document precede a target; "by_context", how
    many tokens the model read to predict it; and "by_prefix", how many of those were prefix. Each
    row has the range "from" … "to" (inclusive), its "tokens" and their "nats_per_token". What is
    held is the text's tokens, one batch, and the tables.

    Args:
      params: parameters of the model.
      batches: those of a single process.
      model: the model.
      track: wraps the results of the batches, to show progress.

    Raises:
      RuntimeError: a token was not counted exactly once.
    """
    step = functools.partial(compiled(token_log_probs, model, batches.prefix_len), params)
    tables = {
        "by_position": _LossTable([0, *(2**i for i in range(32))], last=2**32),
        "by_context": _LossTable.of_equal_ranges(1, model.config.max_seq_len),
        "by_prefix": _LossTable.of_equal_ranges(0, batches.prefix_len),
    }
    tokens, nats = 0, 0.0
    for index, nats_K in enumerate(track(_counted_nats(step, batches, batches.prefix_len))):
        for table, values_K in zip(tables.values(), batches.places(index), strict=True):
            table.add(values_K, nats_K)
        tokens += len(nats_K)
        nats += nats_K.sum()
    rows = {name: table.rows() for name, table in tables.items()}
    return dataclasses.replace(_evaluation(nats, tokens, batches), tables=rows)


def _counted_nats(step, batches, prefix_len) -> Iterator[np.ndarray]:
    """-log p of the counted targets of each batch, in the order of the text."""
    is_counted = []

    def noted():
        for arrays in batches:
            is_counted.append(arrays["weights"][:, prefix_len:] > 0)
            yield Batch(**arrays)

    for log_probs_BL in one_at_a_time(step, noted()):
        yield -log_probs_BL[is_counted.pop(0)].astype(np.float64)


def _evaluation(nats: float, tokens: float, batches: EvaluationBatches) -> Evaluation:
    if tokens != batches.num_tokens:
        raise RuntimeError(
            f"the weights of all batches add up to {tokens:g}, but the text has "
            f"{batches.num_tokens} tokens: each must be counted once"
        )
    return Evaluation(
        loss=nats / tokens,
        num_tokens=batches.num_tokens,
        num_bytes=batches.num_bytes,
        num_words=batches.num_words,
    )


class _LossTable:
    """Sums of nats over ranges of a value, each from one of `edges` up to before the next."""

    def __init__(self, edges, last):
        self._edges = np.array([*edges, last + 1])
        self._tokens, self._nats = np.zeros((2, len(edges)))

    @classmethod
    def of_equal_ranges(cls, first, last):
        """At most 17 ranges, of equal width."""
        return cls(range(first, last + 1, max(1, -(-(last - first) // 16))), last)

    def add(self, values_K, nats_K):
        bins_K = np.searchsorted(self._edges, values_K, side="right") - 1
        self._tokens += np.bincount(bins_K, minlength=len(self._nats))
        self._nats += np.bincount(bins_K, nats_K, minlength=len(self._nats))

    def rows(self) -> Table:
        sums = zip(itertools.pairwise(self._edges.tolist()), self._tokens.tolist(),
                   self._nats.tolist(), strict=True)  # fmt: skip
        return [
            {
                "from": low,
                "to": next_low - 1,
                "tokens": int(tokens),
                "nats_per_token": nats / tokens,
            }
            for (low, next_low), tokens, nats in sums
            if tokens
        ]


@functools.cache
def compiled(step: Callable, model: PerceiverAR, prefix_len: int, **more: int) -> Callable:
    """A function of parameters and a batch, compiled once for each shape."""
    return jax.jit(functools.partial(step, model=model, prefix_len=prefix_len, **more))
