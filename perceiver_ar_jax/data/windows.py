"""Documents joined with eos and cut into windows of uniformly drawn length, left-padded.

Documents are assigned round-robin to V streams, one per row of the global batch: stream v reads
documents v, v + V, v + 2V, ... of the shuffled, repeated order and produces row v of every batch.
So batches depend neither on the number of hosts nor on the number of workers, each document is read
by one stream once per epoch, and the position of a stream is two numbers: its current document and
how many tokens of it are consumed.
"""

from collections.abc import Sequence

import grain
import numpy as np

from perceiver_ar_jax.data.documents import DocumentSource, TokenDocument
from perceiver_ar_jax.data.rows import pad_rows, write_window

MAX_EMPTY_IN_A_ROW = 1000  # more than that is an error, not an endless search for text


class OrderedDocuments:
    """The documents of a source in reading order; each epoch has its own order.

    Only the order comes from Grain: mapping with Grain would add half of the tokenizer's time.
    """

    def __init__(self, source: DocumentSource, *, seed: int, shuffle: bool, repeat: bool):
        order = grain.MapDataset.range(len(source)).seed(seed)
        if shuffle:
            order = order.shuffle()
        self._order = order.repeat() if repeat else order
        self._source = source
        self.oddities = source.oddities

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> TokenDocument:
        return self._source[self._order[place]]


class WindowDataset(grain.IterDataset):
    """One element per step: a window from each of some streams, stacked.

    Elements: the arrays of `pad_rows`, (streams, max_seq_len) each, and for the loader `step`,
    `rows` (which streams), `positions` (of the streams after the step) and `oddities` (documents
    with each).

    Args:
      streams: which of the `num_streams` to read.
      positions: (document, consumed tokens) of each of them, to continue from.
    """

    def __init__(
        self,
        documents: OrderedDocuments,
        *,
        streams: Sequence[int],
        positions: Sequence[tuple[int, int]],
        step: int,
        num_streams: int,
        min_seq_len: int,
        max_seq_len: int,
        pad_id: int,
        seed: int,
        with_segment_ids: bool,
    ):
        super().__init__()
        self.documents = documents
        self.streams = list(streams)
        self.positions = list(positions)
        self.step = step
        self.num_streams = num_streams
        self.min_seq_len = min_seq_len
        self.max_seq_len = max_seq_len
        self.pad_id = pad_id
        self.seed = seed
        self.with_segment_ids = with_segment_ids

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by Grain in each worker process, which takes its share of the streams."""
        del sequential_slice
        self.streams = self.streams[sl]
        self.positions = self.positions[sl]

    def __iter__(self) -> "WindowIterator":
        return WindowIterator(self)


class WindowIterator(grain.DatasetIterator):
    """Ends when all of its streams have ended; until then, an ended stream gives only pads."""

    def __init__(self, dataset: WindowDataset):
        super().__init__()
        self._dataset = dataset
        self.set_state({"step": dataset.step, "positions": dataset.positions})

    def get_state(self) -> dict:
        """The next step and the position of each stream; plain JSON types."""
        positions = [[stream.document, stream.used] for stream in self._streams]
        return {"step": self._step, "positions": positions}

    def set_state(self, state: dict) -> None:
        """Continues from where `get_state` was called."""
        dataset = self._dataset
        self._step = state["step"]
        self._streams = [
            _Stream(dataset.documents, number, dataset.num_streams, *position)
            for number, position in zip(dataset.streams, state["positions"], strict=True)
        ]

    def __next__(self) -> dict[str, np.ndarray]:
        dataset = self._dataset
        lengths = window_lengths(
            dataset.seed, self._step, dataset.num_streams, dataset.min_seq_len, dataset.max_seq_len
        )
        element = pad_rows(
            len(self._streams),
            dataset.max_seq_len,
            pad_id=dataset.pad_id,
            with_segment_ids=dataset.with_segment_ids,
        )
        oddities = np.zeros(len(dataset.documents.oddities), np.int64)
        for row, stream in enumerate(self._streams):
            parts = stream.take(lengths[stream.number] + 1, oddities)
            window = np.concatenate(parts) if parts else np.empty(0, np.int32)
            if len(window) > 1:  # a single token has nothing to predict
                documents = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
                write_window(element, row, window, documents[:-1])
        if element["pad_mask"].all():
            raise StopIteration
        self._step += 1
        state = self.get_state()
        return element | {
            "step": np.array(state["step"]),
            "rows": np.array(dataset.streams),
            "positions": np.array(state["positions"]),
            "oddities": oddities,
        }


def window_lengths(seed: int, step: int, num_streams: int, low: int, high: int) -> np.ndarray:
    """The lengths of a step's windows, uniform in [low, high]; a function of seed and step."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    return generator.integers(low, high, size=num_streams, endpoint=True)


class _Stream:
    """Every `num_streams`-th document starting at `number`, from a position in one of them."""

    def __init__(self, documents, number: int, num_streams: int, document: int, used: int):
        self.number = number
        self.document = document
        self.used = used
        self._documents = documents
        self._num_streams = num_streams
        self._tokens = None

    def take(self, count: int, oddities: np.ndarray) -> list[np.ndarray]:
        """The next `count` tokens, one array per document; fewer at the end. Adds to `oddities`."""
        parts = []
        begin = self.document
        while count > 0:
            if not parts and self.document - begin > MAX_EMPTY_IN_A_ROW:
                raise ValueError(
                    f"{MAX_EMPTY_IN_A_ROW} documents in a row hold no text "
                    '(JSON lines hold it under the key "text")'
                )
            if self._tokens is None:
                index = self.number + self._num_streams * self.document
                if index >= len(self._documents):
                    break
                document = self._documents[index]
                self._tokens = document.tokens
                if not self.used:
                    oddities += [name in document.oddities for name in self._documents.oddities]
            part = self._tokens[self.used : self.used + count]
            if len(part):
                parts.append(part)
            self.used += len(part)
            count -= len(part)
            if self.used >= len(self._tokens):  # above: the document has become shorter
                self.document, self.used, self._tokens = self.document + 1, 0, None
        return parts
