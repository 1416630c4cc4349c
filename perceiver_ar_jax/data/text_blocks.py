"""The texts of a prepared dataset in blocks of consecutive ones, without an index."""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence

from perceiver_ar_jax.data.read_ahead import read_in_order
from perceiver_ar_jax.data.record_blocks import Span
from perceiver_ar_jax.data.sources import Shard, Text, TextSource


class TextBlocks:
    """Blocks of about `block_bytes` of a file, each read by one request; pickles.

    Takes memory for each file, none for a block or a record. Only a file of which the split takes a
    part is read when this is made, up to the end of that part, to count its records.

    Raises:
      ValueError: such a file has other records than expected.
      StorageError: it cannot be read.
    """

    def __init__(self, source: TextSource, block_bytes: int):
        self.block_bytes = block_bytes
        self._read_records = source.read_records
        self._parse = source.parse
        self._files = [
            _File(shard, size, self._pieces(shard, size))
            for shard, (_, size) in zip(source.shards, source.files, strict=True)
        ]
        self._ends = list(itertools.accumulate(map(self._num_blocks, self._files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> list[Text]:
        """The texts of a block; there are none if a record is longer than the block."""
        number = bisect.bisect_right(self._ends, index)
        file = self._files[number]
        block = index - (self._ends[number] - self._num_blocks(file))
        records = slice(None)
        if file.pieces is not None:
            block, records = file.pieces[block]
        span = self._span(file.shard.path, file.size, block)
        try:
            return [
                self._parse(record, False, False) for record in self._read_records(span)[records]
            ]
        except ValueError as error:
            if span.path in str(error):
                raise
            raise ValueError(f"{span.path}, bytes {span.start} to {span.end}: {error}") from error

    def _num_blocks(self, file: "_File") -> int:
        return -(-file.size // self.block_bytes) if file.pieces is None else len(file.pieces)

    def _span(self, path: str, size: int, block: int) -> Span:
        start = block * self.block_bytes
        return Span(path, start, min(start + self.block_bytes, size), size)

    def _pieces(self, shard: Shard, size: int) -> list[tuple[int, slice]] | None:
        """(block, which of its records) for a file that the split has only a part of."""
        if shard.count == shard.num_records:
            return None
        pieces, seen, last = [], 0, shard.first + shard.count
        read = functools.partial(_count, self._read_records, self._span, shard.path, size)
        for block, count in enumerate(read_in_order(read, -(-size // self.block_bytes))):
            records = slice(max(shard.first - seen, 0), min(last - seen, count))
            if records.start < records.stop:
                pieces.append((block, records))
            seen += count
            if seen >= last:
                return pieces
        raise ValueError(
            f"{shard.path} has {seen} records, {shard.num_records} were expected: "
            "the file changed or belongs to another version"
        )


class _File:
    def __init__(self, shard: Shard, size: int, pieces: Sequence[tuple[int, slice]] | None):
        self.shard, self.size, self.pieces = shard, size, pieces


def _count(
    read_records: Callable[[Span], list[bytes]],
    span: Callable[[str, int, int], Span],
    path: str,
    size: int,
    block: int,
) -> int:
    return len(read_records(span(path, size, block)))
