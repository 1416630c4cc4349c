"""Documents joined with eos and cut into windows of uniformly drawn length, left-padded.

Blocks of documents are assigned round-robin to V streams, one per row of the global batch: stream v
reads blocks v, v + V, v + 2V, ... of the shuffled, repeated order and produces row v of every
batch. So batches depend neither on the number of hosts nor on the number of workers, each document
is read by one stream once per epoch, and the position of a stream is three numbers: its current
block, the document in it, and how many tokens of that are consumed. Of several sources, a row has a
stream of each, and every window comes from one that is drawn by weight.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from perceiver_ar_jax.data import storage
from perceiver_ar_jax.data.documents import DocumentSource, TokenDocument, blocks_of, oddities_of
from perceiver_ar_jax.data.read_ahead import NUM_THREADS, ReadAhead
from perceiver_ar_jax.data.rows import pad_rows, write_window

MAX_EMPTY_IN_A_ROW = 1000  # more than that is an error, not an endless search for text


class OrderedBlocks:
    """The blocks of a source in reading order; each epoch has its own order.

    Only the order comes from Grain: mapping with Grain would add half of the tokenizer's time.
    """

    def __init__(
        self, source: DocumentSource, *, num_streams: int, seed: int, shuffle: bool, repeat: bool
    ):
        self._blocks = blocks_of(source, num_streams)
        order = grain.MapDataset.range(len(self._blocks)).seed(seed)
        if shuffle:
            order = order.shuffle()
        self._order = order.repeat() if repeat else order
        self.oddities = source.oddities
        self.documents_are_windows = source.documents_are_windows
        self.reads_ahead = self._blocks.reads_ahead
        self.fingerprint = self._blocks.fingerprint

    def __len__(self) -> int:
        return len(self._order)

    def read(self, place: int) -> Sequence[Any]:
        """One item for each document of a block."""
        return self._blocks.read(self._order[place])

    def document(self, item: Any) -> TokenDocument:
        """The document of an item."""
        return self._blocks.document(item)


class WindowDataset(grain.IterDataset):
    """One element per step: a window from each of some rows, stacked.

    Elements: the arrays of `pad_rows`, (rows, max_seq_len) each, and for the loader `step`, `rows`
    (which rows), `positions` (of their streams after the step), `oddities` (documents with each)
    and `retries` (requests that were repeated).

    Args:
      sources: the ordered blocks of each.
      weights: the share of windows from each source, up to a factor.
      rows: which of the `num_rows` of the global batch to make.
      positions: (block, document, consumed tokens) of each source for each of them, to continue
        from; flat.
    """

    def __init__(
        self,
        sources: Sequence[OrderedBlocks],
        *,
        weights: Sequence[float],
        rows: Sequence[int],
        positions: Sequence[Sequence[int]],
        step: int,
        num_rows: int,
        min_seq_len: int,
        max_seq_len: int,
        pad_id: int,
        seed: int,
        with_segment_ids: bool,
    ):
        super().__init__()
        self.sources = list(sources)
        self.weights = list(weights)
        self.rows = list(rows)
        self.positions = list(positions)
        self.step = step
        self.num_rows = num_rows
        self.min_seq_len = min_seq_len
        self.max_seq_len = max_seq_len
        self.pad_id = pad_id
        self.seed = seed
        self.with_segment_ids = with_segment_ids
        self.oddities = oddities_of(self.sources)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by Grain in each worker process, which takes its share of the rows."""
        del sequential_slice
        self.rows = self.rows[sl]
        self.positions = self.positions[sl]

    def __iter__(self) -> "WindowIterator":
        return WindowIterator(self)


class WindowIterator(grain.DatasetIterator):
    """Ends when all of its streams have ended; until then, an ended row gives only pads."""

    def __init__(self, dataset: WindowDataset):
        super().__init__()
        self._dataset = dataset
        self._readers = []
        self.set_state({"step": dataset.step, "positions": dataset.positions})

    def get_state(self) -> dict:
        """The next step and the positions of each row; plain JSON types."""
        positions = [
            [number for stream in streams for number in stream.position]
            for streams in self._streams
        ]
        return {"step": self._step, "positions": positions}

    def set_state(self, state: dict) -> None:
        """Continues from where `get_state` was called."""
        self.close()
        dataset = self._dataset
        self._step = state["step"]
        self._readers = [_BlockReader(source, len(dataset.rows)) for source in dataset.sources]
        self._streams = [
            [
                _Stream(reader, row, dataset.num_rows, position[3 * i : 3 * i + 3])
                for i, reader in enumerate(self._readers)
            ]
            for row, position in zip(dataset.rows, state["positions"], strict=True)
        ]

    def close(self) -> None:
        """Ends the threads."""
        for reader in self._readers:
            reader.close()

    def __next__(self) -> dict[str, np.ndarray]:
        dataset = self._dataset
        lengths = window_lengths(
            dataset.seed, self._step, dataset.num_rows, dataset.min_seq_len, dataset.max_seq_len
        )
        chosen = drawn_sources(dataset.seed, self._step, dataset.num_rows, dataset.weights)
        element = pad_rows(
            len(self._streams),
            dataset.max_seq_len,
            pad_id=dataset.pad_id,
            with_segment_ids=dataset.with_segment_ids,
        )
        oddities = np.zeros(len(dataset.oddities), np.int64)
        for streams in self._streams:
            for stream in streams:
                stream.request()
        for row, (number, streams) in enumerate(zip(dataset.rows, self._streams, strict=True)):
            first = chosen[number]
            for stream in streams[first:] + streams[:first]:  # the others if the first has ended
                parts = stream.take(lengths[number] + 1)
                for document in stream.opened():
                    found = [name in document.oddities for name in dataset.oddities]
                    oddities += np.array(found, bool)
                sizes = [len(tokens) for tokens, _ in parts]
                if sum(sizes) > 1:  # a single token has nothing to predict
                    window, counted = map(np.concatenate, zip(*parts, strict=True))
                    documents = np.repeat(np.arange(1, len(parts) + 1), sizes)
                    write_window(element, row, window, documents[:-1], counted=counted[1:])
                    break
        if element["pad_mask"].all():
            raise StopIteration
        self._step += 1
        state = self.get_state()
        return element | {
            "step": np.array(state["step"]),
            "rows": np.array(dataset.rows),
            "positions": np.array(state["positions"]),
            "oddities": oddities,
            "retries": np.array(storage.retries.take()),
        }


def window_lengths(seed: int, step: int, num_rows: int, low: int, high: int) -> np.ndarray:
    """The lengths of a step's windows, uniform in [low, high]; a function of seed and step."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    return generator.integers(low, high, size=num_rows, endpoint=True)


def drawn_sources(seed: int, step: int, num_rows: int, weights: Sequence[float]) -> np.ndarray:
    """Which source each window of a step comes from; a function of seed and step."""
    if len(weights) == 1:
        return np.zeros(num_rows, np.int64)
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, step]))
    shares = np.cumsum(weights) / np.sum(weights)
    return np.searchsorted(shares[:-1], generator.random(num_rows), side="right")


class _BlockReader:
    """The blocks of a source; those that do not come from memory are read ahead by threads."""

    def __init__(self, blocks: OrderedBlocks, num_rows: int):
        self.blocks = blocks
        self.depth = -(-NUM_THREADS // max(num_rows, 1))  # how many blocks of a stream to request
        self._ahead = None

    def request(self, place: int) -> None:
        if self.blocks.reads_ahead and place < len(self.blocks):
            if self._ahead is None:
                self._ahead = ReadAhead(self.blocks.read)
            self._ahead.request(place)

    def take(self, place: int) -> Sequence[Any]:
        return self._ahead.take(place) if self._ahead else self.blocks.read(place)

    def close(self) -> None:
        if self._ahead:
            self._ahead.close()
            self._ahead = None


class _Stream:
    """Every `num_rows`-th block of a source starting at `row`, from a position in one of them."""

    def __init__(self, reader: _BlockReader, row: int, num_rows: int, position: Sequence[int]):
        self._block, self._document, self._used = position
        self._reader = reader
        self._row = row
        self._num_rows = num_rows
        self._items = self._tokens = self._counted = None
        self._opened = []

    @property
    def position(self) -> tuple[int, int, int]:
        return self._block, self._document, self._used

    def request(self) -> None:
        """Begins to read the blocks that are needed next."""
        first = self._block + (self._items is not None)
        for block in range(first, first + self._reader.depth):
            self._reader.request(self._row + self._num_rows * block)

    def take(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The next `count` tokens and which of them count, a pair per document.

        Fewer at the end, and where documents are windows: those are of one document, whose rest is
        skipped.
        """
        parts = []
        empty = 0
        while count > 0:
            if self._tokens is None:
                document = self._next_document()
                if document is None:
                    break
                self._tokens, self._counted = document.tokens, document.counted
                if self._counted is None:
                    self._counted = np.ones(len(self._tokens), bool)
                if not self._used:
                    self._opened.append(document)
            taken = slice(self._used, self._used + count)
            part = self._tokens[taken]
            empty = 0 if len(part) or parts else empty + 1
            if empty > MAX_EMPTY_IN_A_ROW:
                raise ValueError(
                    f"{MAX_EMPTY_IN_A_ROW} documents in a row hold no text "
                    '(JSON lines hold it under the key "text")'
                )
            if len(part):
                parts.append((part, self._counted[taken]))
            self._used += len(part)
            count -= len(part)
            if parts and self._reader.blocks.documents_are_windows:
                count, self._used = 0, len(self._tokens)
            if self._used >= len(self._tokens):  # above: the document has become shorter
                self._advance()
        return parts

    def opened(self) -> Iterator[TokenDocument]:
        """The documents that were begun since the last call."""
        while self._opened:
            yield self._opened.pop()

    def _next_document(self) -> TokenDocument | None:
        while self._items is None or self._document >= len(self._items):
            if self._items is not None:  # an empty block, or one that has become shorter
                self._block, self._document, self._used = self._block + 1, 0, 0
            place = self._row + self._num_rows * self._block
            if place >= len(self._reader.blocks):
                self._items = None
                return None
            self._items = self._reader.take(place)
            self.request()
        return self._reader.blocks.document(self._items[self._document])

    def _advance(self) -> None:
        self._document, self._used, self._tokens = self._document + 1, 0, None
        if self._document >= len(self._items):
            self._block, self._document, self._items = self._block + 1, 0, None
