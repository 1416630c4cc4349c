"""A tensor that is still in its file."""

import dataclasses
import math
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes, in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Place, type and shape of a tensor in a file; `np.asarray` reads it, each time anew.

    It reads rather than maps, so that a large checkpoint never counts twice in memory: once as
    pages of the file and once as parameters.
    """

    path: Path
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None  # in elements; None: contiguous, in C order
    crc32: int | None = None  # of the bytes, where the file has a checksum of just these

    @property
    def nbytes(self) -> int:
        """Size of the array, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        count = math.prod(self.shape)
        if self.strides is not None and count:
            count = 1 + sum(
                (n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)
            )
        size = count * self.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, size, offset=self.offset)
        if raw.size != size:
            raise ValueError(f"{self.path} ends within a tensor: it is cut off")
        if self.crc32 is not None and checksum(raw) != self.crc32:
            raise ValueError(
                f"{self.path} is damaged: the checksum of the {size} bytes at {self.offset} differs"
            )
        array = raw.view(self.dtype)
        if self.strides is None:
            array = array.reshape(self.shape)
        else:
            steps = [step * self.dtype.itemsize for step in self.strides]
            array = np.lib.stride_tricks.as_strided(array, self.shape, steps)
        return array if dtype is None else array.astype(dtype, copy=False)
