"""The safetensors format: a length, a JSON header, then the bytes of all tensors.

Read and written here rather than by the safetensors package, which holds a whole model in memory
twice when it saves.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_ar_jax.conversion.stored_tensor import DTYPES, StoredTensor

DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NAMES_BY_DTYPE = {DTYPES[name]: code for code, name in DTYPE_NAMES.items()}
MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, left in place.

    Raises:
      ValueError: a file that is cut off, damaged or something else, naming it.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 0 < header_size <= min(file_size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: its header claims {header_size} bytes, the file has {file_size}: "
                "it is cut off or no safetensors file"
            )
        raw = file.read(header_size)
    try:
        header = json.loads(raw.decode())
        return {
            name: _stored(path, 8 + header_size, file_size, **entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except ValueError as error:
        raise ValueError(f"{path}: damaged safetensors file ({error})") from None
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: damaged safetensors header ({type(error).__name__})") from None


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes arrays as they come; `specs` has the dtype and shape of each, in the same order."""
    # transformers refuses a file without this format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES_BY_DTYPE[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, array), (expected, spec) in zip(arrays, specs.items(), strict=True):
            if name != expected or (array.dtype, array.shape) != spec:
                raise ValueError(f"{name} is not the announced {expected} {spec}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _stored(path, data_start, file_size, *, dtype, shape, data_offsets) -> StoredTensor:
    start, end = data_offsets
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or len(shape) > 32:
        raise ValueError("a shape or an offset is not a whole number")
    numpy_dtype = DTYPES[DTYPE_NAMES[dtype]]
    if end - start != math.prod(shape) * numpy_dtype.itemsize:
        raise ValueError(f"{end - start} bytes for shape {tuple(shape)} of {dtype}")
    if data_start + end > file_size:
        raise ValueError("a tensor lies beyond the end of the file: it is cut off")
    return StoredTensor(path, data_start + start, numpy_dtype, tuple(shape))
