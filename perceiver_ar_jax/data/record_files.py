"""Files as random-access records: `len(file)` and `file.read(i)`, which gives bytes."""

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from etils import epath

from perceiver_ar_jax.data.crc32c import masked_crc32c

MAX_PIECE_BYTES = 1 << 14


class ArrayRecordFile:
    """One ArrayRecord shard.

    Raises:
      ValueError: the file is damaged.
    """

    def __init__(self, path: str):
        self._path = path
        try:
            self._reader = array_record_module.ArrayRecordReader(
                path, "readahead_buffer_size:0,max_parallelism:0"
            )
            self._num_records = self._reader.num_records()
        except (RuntimeError, ValueError) as error:
            raise ValueError(_damaged(path, "ArrayRecord", error)) from error
        if not self._num_records:  # what the reader says if the end of the file is missing
            raise ValueError(_damaged(path, "ArrayRecord", "no records, truncated or empty"))

    def __len__(self) -> int:
        return self._num_records

    def read(self, i: int) -> bytes:
        """Record `i`. Reads a range: a list of indices takes time linear in the file's records."""
        try:
            return self._reader.read(i, i + 1)[0]
        except (RuntimeError, IndexError) as error:
            raise ValueError(_damaged(self._path, "ArrayRecord", error)) from error


class _RangesFile:
    """Record i is the bytes from `offsets[i]` to `offsets[i + 1]`; the file stays open."""

    def __init__(self, path: str):
        self._path = path
        self._file = epath.Path(path).open("rb")
        self._offsets = self._find_offsets()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, i: int) -> bytes:
        """Record `i`."""
        start, end = int(self._offsets[i]), int(self._offsets[i + 1])
        self._file.seek(start)
        return self._file.read(end - start)

    def __del__(self):
        if "_file" in self.__dict__:
            self._file.close()


class LineFile(_RangesFile):
    """The lines of a file."""

    def _find_offsets(self) -> np.ndarray:
        return np.fromiter(_line_ends(self._file), np.int64)


class PieceFile(_RangesFile):
    """A plain text in pieces that end where a paragraph or a line does.

    Pieces have at most 16 KiB; a small file is cut into about 64 pieces of at least 1 KiB.
    """

    def _find_offsets(self) -> np.ndarray:
        piece_bytes = min(MAX_PIECE_BYTES, max(1024, epath.Path(self._path).stat().length // 64))
        return np.fromiter(_piece_ends(self._file, piece_bytes), np.int64)


class TFRecordFile(_RangesFile):
    """One TFRecord shard: `length, crc(length), data, crc(data)` for each record.

    The first use of a file scans it for the records' offsets and stores them in a cache folder
    (PERCEIVER_AR_CACHE, default ~/.cache/perceiver_ar_jax).

    Raises:
      ValueError: the file is cut off or a checksum is wrong; says where.
    """

    def read(self, i: int) -> bytes:
        """The data of record `i`, its checksum verified."""
        return unframed(self._path, int(self._offsets[i]), super().read(i))

    def _find_offsets(self) -> np.ndarray:
        return _cached_offsets(self._path)


def tfrecords(path: str) -> Iterator[bytes]:
    """The records of a TFRecord file in order, checksums verified, without an index."""
    size = epath.Path(path).stat().length
    with epath.Path(path).open("rb") as file:
        for start, end in itertools.pairwise(_record_ends(path, size)):
            yield unframed(path, start, file.read(end - start))


def _line_ends(file):
    position = 0
    yield position
    for line in file:
        position += len(line)
        yield position


def _piece_ends(file, piece_bytes: int):
    position = 0
    yield position
    while True:
        file.seek(position)
        piece = file.read(piece_bytes)
        if not piece:
            return
        position += len(piece) if len(piece) < piece_bytes else _good_length(piece)
        yield position


def _good_length(piece: bytes) -> int:
    """Up to the last empty line, otherwise the last line end, otherwise the last character."""
    for end in (b"\n\n", b"\n"):
        place = piece.rfind(end, len(piece) // 2)
        if place >= 0:
            return place + len(end)
    length = len(piece)
    while length > len(piece) - 4 and piece[length - 1] & 0xC0 == 0x80:
        length -= 1
    return length - (piece[length - 1] >= 0xC0)


def _cached_offsets(path: str) -> np.ndarray:
    stat = epath.Path(path).stat()
    key = hashlib.sha256(f"{path} {stat.length} {stat.mtime}".encode()).hexdigest()[:32]
    folder = Path(os.environ.get("PERCEIVER_AR_CACHE", "~/.cache/perceiver_ar_jax")).expanduser()
    cached = folder / "tfrecord" / f"{key}.npy"
    if not cached.is_file():
        offsets = np.fromiter(_record_ends(path, stat.length), np.int64)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            np.save(file, offsets)
        os.replace(file.name, cached)  # atomic: other processes read it
    return np.load(cached, mmap_mode="r")


def _record_ends(path: str, size: int):
    """Checksums of lengths are not verified: with a wrong length that of the data fails."""
    position = 0
    yield position
    with epath.Path(path).open("rb") as file:
        while position < size:
            length = int.from_bytes(file.read(12)[:8], "little")
            if position + 16 + length > size:
                raise ValueError(_damaged(path, "TFRecord", f"cut off after byte {position}"))
            file.seek(length + 4, os.SEEK_CUR)
            position += 16 + length
            yield position


def unframed(path: str, start: int, framed: bytes) -> bytes:
    """The data of a TFRecord that begins at byte `start` of a file, its checksum verified."""
    data = framed[12:-4]
    if masked_crc32c(data) != int.from_bytes(framed[-4:], "little"):
        raise ValueError(f"{path}: wrong checksum of the record at byte {start}")
    return data


def _damaged(path: str, kind: str, reason) -> str:
    reason = str(reason).strip().splitlines()[0] if str(reason).strip() else "truncated or empty"
    size = epath.Path(path).stat().length if epath.Path(path).exists() else 0
    return f"{path} ({size:,} bytes) is a damaged {kind} file: {reason}"
