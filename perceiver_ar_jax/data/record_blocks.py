"""Blocks of consecutive records, read without the index of a file: one range request each.

A block is a range of bytes, and its records are those that begin there. Both formats let a reader
find the first of them: an ArrayRecord file says at each multiple of 64 KiB where the next chunk
begins, and the header of a TFRecord carries its own checksum.
"""

import functools
import tempfile
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module

from perceiver_ar_jax.data import storage
from perceiver_ar_jax.data.crc32c import masked_crc32c
from perceiver_ar_jax.data.highway_hash import highway_hash
from perceiver_ar_jax.data.record_files import unframed

SLACK = 1 << 14  # bytes read after a block, for the end of its last record
RIEGELI_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_ARRAY_RECORD_MAGIC = 0x71930E704FDAE05E
_POSTSCRIPT_BYTES = 256  # more than its chunk has


class Span(NamedTuple):
    """Bytes `[start, end)` of a file of `size` bytes; `start` is a multiple of 64 KiB."""

    path: str
    start: int
    end: int
    size: int


def read_tfrecords(span: Span) -> list[bytes]:
    """The records that begin in a span of a TFRecord file, their checksums verified.

    Raises:
      ValueError: the file is damaged; says where.
      StorageError: the file cannot be read.
    """
    file = _Window(span)
    position = 0 if span.start == 0 else _first_tfrecord(file, span)
    records = []
    while position is not None and position < span.end:
        length = _tfrecord_length(file, position)
        records.append(unframed(span.path, position, file.read(position, 16 + length)))
        position += 16 + length
    if position is not None and position < span.size:
        # The reader of the next span would skip a record whose header is damaged.
        _tfrecord_length(file, position)
    return records


def read_array_records(span: Span) -> list[bytes]:
    """The records that begin in a span of an ArrayRecord file, their checksums verified.

    Raises:
      ValueError: the file is damaged.
      StorageError: the file cannot be read.
    """
    footer = _footer_offset(span.path, span.size)
    end = min(span.end, footer)
    if span.start >= end:
        return []
    file = _Window(span)
    position = _first_chunk(file, span.start)
    chunks = []
    while position < end:
        header = file.read_chunk_bytes(position, _CHUNK_HEADER)
        data_size, num_records = _number(header[8:16]), _number(header[25:32])
        if header[24:25] in (b"r", b"t"):  # the others hold no records
            chunks.append((position - span.start, num_records))
        position = max(
            _after_chunk_bytes(position, _CHUNK_HEADER + data_size),
            _possible_chunk_begin(position + num_records),
        )
        if position > footer:
            raise file.damaged(f"a chunk ends after byte {footer}")
    return _decode(span.path, file.read(span.start, position - span.start), chunks)


class _Window:
    """The bytes of a span and those after it, as far as they are needed."""

    def __init__(self, span: Span):
        self._span = span
        self._data = storage.read_range(span.path, span.start, min(span.end + SLACK, span.size))

    def read(self, position: int, length: int) -> bytes:
        """`length` bytes from the file's byte `position`."""
        span = self._span
        if position + length > span.size:
            raise self.damaged(f"cut off after byte {position}")
        have = span.start + len(self._data)
        if position + length > have:
            self._data += storage.read_range(span.path, have, position + length)
        return self._data[position - span.start : position - span.start + length]

    def read_chunk_bytes(self, position: int, length: int) -> bytes:
        """`length` bytes of the Riegeli chunk that begins at `position`, without block headers."""
        raw = self.read(position, _after_chunk_bytes(position, length) - position)
        border = -position % RIEGELI_BLOCK
        return raw[:border] + raw[border + _BLOCK_HEADER :] if border < len(raw) else raw

    def damaged(self, reason: str) -> ValueError:
        span = self._span
        return ValueError(f"{span.path} ({span.size:,} bytes) is a damaged file: {reason}")


def _first_tfrecord(file: _Window, span: Span) -> int | None:
    """The first position in the span at which a header has its checksum, 2^-32 by chance."""
    length = min(span.end + 11, span.size) - span.start
    data = np.frombuffer(file.read(span.start, length), np.uint8)
    zeros = data == 0
    is_small = zeros[4:-7] & zeros[5:-6] & zeros[6:-5] & zeros[7:-4]  # lengths below 4 GiB
    for place in np.flatnonzero(is_small):
        header = data[place : place + 12].tobytes()
        if masked_crc32c(header[:8]) == _number(header[8:]):
            return span.start + int(place)
    return None


def _tfrecord_length(file: _Window, position: int) -> int:
    header = file.read(position, 12)
    if masked_crc32c(header[:8]) != _number(header[8:]):
        raise file.damaged(f"wrong checksum of the record's length at byte {position}")
    return _number(header[:8])


@functools.lru_cache(maxsize=1 << 14)  # of each file once per process
def _footer_offset(path: str, size: int) -> int:
    """Where the data of an ArrayRecord file ends, from its postscript."""
    if size < RIEGELI_BLOCK:
        raise ValueError(f"{path} ({size:,} bytes) is a damaged ArrayRecord file: truncated")
    begin = size - RIEGELI_BLOCK
    data = storage.read_range(path, begin, begin + _POSTSCRIPT_BYTES)[_BLOCK_HEADER:]
    size_of_data = _number(data[8:16])
    content = data[_CHUNK_HEADER : _CHUNK_HEADER + size_of_data]
    if _number(data[:8]) == highway_hash(data[8:_CHUNK_HEADER]) and _number(
        data[16:24]
    ) == highway_hash(content):
        # Compression (none), the length of the sizes, the sizes, and the first of the records:
        # field 1 is the footer's offset, field 2 the magic number.
        start = 2 + content[1]
        offset, start = _varint(content, start + 1)
        magic, _ = _varint(content, start + 1)
        if magic == _ARRAY_RECORD_MAGIC:
            return offset
    raise ValueError(f"{path} ({size:,} bytes) is a damaged ArrayRecord file: no postscript")


def _first_chunk(file: _Window, start: int) -> int:
    """Where the first chunk from `start` on begins, by Riegeli's block header there."""
    header = file.read(start, _BLOCK_HEADER)
    if _number(header[:8]) != highway_hash(header[8:]):
        raise file.damaged(f"wrong checksum of the block header at byte {start}")
    since_begin, until_end = _number(header[8:16]), _number(header[16:])
    return start if since_begin == 0 else start + until_end


def _after_chunk_bytes(begin: int, length: int) -> int:
    """The position after `length` bytes of a chunk, counting the block headers between them."""
    usable = RIEGELI_BLOCK - _BLOCK_HEADER
    headers = (length + (begin + usable - 1) % RIEGELI_BLOCK) // usable
    return begin + length + headers * _BLOCK_HEADER


def _possible_chunk_begin(position: int) -> int:
    """`position`, or the end of the block header that it lies in."""
    inside = position % RIEGELI_BLOCK
    return position + _BLOCK_HEADER - inside if 0 < inside < _BLOCK_HEADER else position


def _round_up(position: int) -> int:
    return -(-position // RIEGELI_BLOCK) * RIEGELI_BLOCK


def _decode(path: str, data: bytes, chunks: list[tuple[int, int]]) -> list[bytes]:
    """The records of `chunks`, (offset, number of records), by ArrayRecord's own reader.

    It gets a small file: 64 KiB left out (a chunk at byte 0 would have to be a file's signature),
    the bytes as they are, which keep their places relative to multiples of 64 KiB, an index of the
    chunks and a postscript.
    """
    if not chunks:
        return []
    begin = RIEGELI_BLOCK
    footer = _round_up(begin + len(data))
    counts = [num_records for _, num_records in chunks]
    metadata = b"\x08\x01\x10" + _to_varint(len(chunks)) + b"\x18" + _to_varint(sum(counts))
    entries = [
        b"\x08" + _to_varint(begin + offset) + b"\x18" + _to_varint(count)
        for offset, count in chunks
    ]
    index = _chunk([b"\x0a" + _to_varint(len(metadata)) + metadata, *entries])
    postscript = _chunk([b"\x08" + _to_varint(footer) + b"\x10" + _to_varint(_ARRAY_RECORD_MAGIC)])
    with tempfile.NamedTemporaryFile() as file:
        file.seek(begin)
        file.write(data)
        file.seek(footer)
        file.write(index)
        file.seek(_round_up(footer + len(index)))
        file.write(postscript.ljust(RIEGELI_BLOCK, b"\0"))
        file.flush()
        try:
            reader = array_record_module.ArrayRecordReader(file.name, "max_parallelism:0")
            records = reader.read_all()
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:
            reason = next(iter(str(error).strip().splitlines()), "unreadable")
            reason = reason.replace(file.name, path)
            raise ValueError(f"{path} is a damaged ArrayRecord file: {reason}") from error
    if len(records) != sum(counts):
        raise ValueError(f"{path} is a damaged ArrayRecord file: records are missing")
    return records


def _chunk(records: list[bytes]) -> bytes:
    """A Riegeli chunk at a multiple of 64 KiB, its block header first; without compression."""
    sizes = b"".join(_to_varint(len(record)) for record in records)
    content = b"".join([b"\0", _to_varint(len(sizes)), sizes, *records])
    header = b"".join(
        [
            _eight_bytes(len(content)),
            _eight_bytes(highway_hash(content)),
            b"r" + len(records).to_bytes(7, "little"),
            _eight_bytes(sum(map(len, records))),
        ]
    )
    length = _BLOCK_HEADER + _CHUNK_HEADER + len(content)
    block_header = _eight_bytes(0) + _eight_bytes(length)
    return b"".join(
        [
            _eight_bytes(highway_hash(block_header)),
            block_header,
            _eight_bytes(highway_hash(header)),
            header,
            content,
        ]
    )


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _eight_bytes(number: int) -> bytes:
    return number.to_bytes(8, "little")


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """A number of a protocol buffer and the position after it."""
    number = shift = 0
    while True:
        byte = data[start]
        number |= (byte & 0x7F) << shift
        start, shift = start + 1, shift + 7
        if byte < 0x80:
            return number, start


def _to_varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])
