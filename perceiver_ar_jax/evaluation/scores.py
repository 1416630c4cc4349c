"""Scores of the last tokens of sequences, in batches of similar length."""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from perceiver_ar_jax.data.rows import pad_rows, write_window
from perceiver_ar_jax.evaluation.batch_size import default_batch_size
from perceiver_ar_jax.evaluation.progress import tracked
from perceiver_ar_jax.evaluation.text import compiled
from perceiver_ar_jax.generation.prompt import bucket_size
from perceiver_ar_jax.parallel import one_at_a_time
from perceiver_ar_jax.pretrained import Pretrained
from perceiver_ar_jax.training import (
    Batch,
    token_log_probs_and_likeliest,
    token_log_probs_and_ranks,
)


class Scores(NamedTuple):
    """Of the scored tokens of a sequence, in order."""

    log_probs: np.ndarray  # (T,) float32, in nats
    ranks: np.ndarray  # (T,) int32, how many tokens are likelier; 0: greedy decoding chooses it


class Predictions(NamedTuple):
    """Of some tokens of a sequence, in order; log-probabilities are in nats."""

    log_probs: np.ndarray  # (T,) float32
    likeliest_ids: np.ndarray  # (T, A) int32, likeliest first
    likeliest_log_probs: np.ndarray  # (T, A) float32


class _Window(NamedTuple):
    """The part of a sequence that the model reads at once, and what is scored of it."""

    sequence: int
    begin: int  # of the inputs
    first: int  # of the scored tokens
    end: int  # of the scored tokens

    @property
    def length(self) -> int:
        return self.end - 1 - self.begin


def score_sequences(
    pretrained: Pretrained,
    sequences: Sequence[tuple[np.ndarray | Sequence[int], int]],
    *,
    batch_size: int | None = None,
    what: str = "batches",
) -> list[Scores]:
    """Log-probabilities of the last tokens of each sequence.

    Windows are as in `data.evaluation_batches`: each scores up to max_latents tokens and reads the
    max_seq_len before its last. Latents are the last max_latents positions, as in training. So
    what a sequence gets depends neither on the others nor on padding. Shapes are rounded up to a
    power of two, at most max_seq_len, and all windows of a shape are batches of one size.

    Args:
      pretrained: the model.
      sequences: token ids, and how many of the last are scored; the first one cannot be.
      batch_size: windows of max_seq_len at once; shorter ones are more. None: what fits.
      what: names the work where progress is shown.

    Raises:
      ValueError: a sequence has no token before those that are scored.
    """
    config = pretrained.config
    batch_size = default_batch_size(config) if batch_size is None else batch_size
    by_length = collections.defaultdict(list)
    scores = []
    for index, (tokens, count) in enumerate(sequences):
        if not 0 <= count < max(len(tokens), 1):
            raise ValueError(f"{count} of {len(tokens)} tokens cannot be scored: the first is read")
        scores.append(Scores(np.zeros(count, np.float32), np.zeros(count, np.int32)))
        for window in _windows(index, len(tokens), count, config):
            by_length[_padded_length(window, config)].append(window)

    batches = []  # (length, rows, windows)
    for length, windows in sorted(by_length.items()):
        rows = max(1, batch_size * config.max_seq_len // length)
        rows = min(rows, 1 << (len(windows) - 1).bit_length())
        batches += [(length, rows, windows[i : i + rows]) for i in range(0, len(windows), rows)]

    def arrays():
        for length, rows, windows in batches:
            yield length, _batch(pretrained, sequences, length, rows, windows)

    def step(length_and_batch):
        length, batch = length_and_batch
        run = compiled(token_log_probs_and_ranks, pretrained.model, _prefix_len(length, config))
        return run(pretrained.params, batch)

    all_results = tracked(one_at_a_time(step, arrays()), len(batches), what)
    for (_, _, windows), results in zip(batches, all_results, strict=True):
        for row, window in enumerate(windows):
            count = window.end - window.first
            first = window.first - (
                len(sequences[window.sequence][0]) - sequences[window.sequence][1]
            )
            for whole, result_BL in zip(scores[window.sequence], results, strict=True):
                whole[first : first + count] = result_BL[row, -count:]
    return scores


def predictions_by_window(
    pretrained: Pretrained, tokens: np.ndarray | Sequence[int], *, num_likeliest: int
) -> Iterator[Predictions]:
    """Scores of all tokens but the first, and the likeliest tokens in the place of each.

    Windows are as in `score_sequences`, but counted from the end, so that the last max_latents
    tokens get what they would get if only they were scored. Each is computed when it is asked for.
    """
    model, config = pretrained.model, pretrained.config
    num_ids = pretrained.tokenizer.vocab_size
    more = {"count": min(num_likeliest, num_ids), "num_ids": num_ids}
    rest = (len(tokens) - 1) % config.max_latents
    first = _windows(0, rest + 1, rest, config)
    for window in (*first, *_windows(0, len(tokens), len(tokens) - 1 - rest, config)):
        length = _padded_length(window, config)
        batch = _batch(pretrained, [(tokens, len(tokens) - 1)], length, 1, [window])
        prefix_len = _prefix_len(length, config)
        run = compiled(token_log_probs_and_likeliest, model, prefix_len, **more)
        found = jax.device_get(run(pretrained.params, batch))
        yield Predictions(*(x_1L[0, window.first - window.end :] for x_1L in found))


def _padded_length(window, config):
    return min(bucket_size(window.length), config.max_seq_len)


def _prefix_len(length, config):
    return max(0, length - config.max_latents)


def _windows(sequence, length, count, config) -> Iterator[_Window]:
    for first in range(length - count, length, config.max_latents):
        end = min(first + config.max_latents, length)
        yield _Window(sequence, max(0, end - 1 - config.max_seq_len), first, end)


def _batch(pretrained, sequences, length, num_rows, windows) -> Batch:
    respect_documents = pretrained.respect_documents
    rows = pad_rows(num_rows, length, pad_id=0, with_segment_ids=respect_documents)
    for row, window in enumerate(windows):
        stream = np.asarray(sequences[window.sequence][0][window.begin : window.end], np.int32)
        documents = np.ones(window.length, np.int32)
        if respect_documents:  # eos closes a document
            documents[1:] += np.cumsum(stream[:-2] == pretrained.tokenizer.eos_id)
        counted = np.arange(window.begin + 1, window.end) >= window.first
        write_window(rows, row, stream, documents, counted=counted)
    return Batch(**rows)
