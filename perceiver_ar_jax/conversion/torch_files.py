"""PyTorch's files (.bin, .pt, .ckpt): the objects in them, tensors left in place.

The zip format, which PyTorch has written since 1.6, is read without torch. The format before it
is left to `torch.load(weights_only=True)`.
"""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perceiver_ar_jax.conversion.pickles import read_pickle
from perceiver_ar_jax.conversion.stored_tensor import DTYPES, StoredTensor

ZIP_MAGIC = b"PK\x03\x04"
OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of PyTorch's magic number

MAX_ELEMENTS = 2**48  # of one tensor; beyond any model, and small enough for NumPy to make a view

ATTRIBUTE_DICTS = (
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)

STORAGE_DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}


class Record(NamedTuple):
    """An uncompressed entry of a zip archive."""

    offset: int
    size: int
    crc32: int


class Storage(NamedTuple):
    """PyTorch's name for the flat memory that tensors are views of."""

    record: Record
    dtype: np.dtype


def read_torch_file(path: Path) -> Any:
    """What `torch.save` was given: dicts, lists, numbers and `StoredTensor`s.

    Objects of other classes come out as `pickles.Inert`; nothing in the file is executed.

    Raises:
      ValueError: a file that is damaged, refused or not PyTorch's, naming it.
    """
    with path.open("rb") as file:
        start = file.read(len(OLD_MAGIC))
    try:
        if start == OLD_MAGIC:
            return _read_old_format(path)
        if not start.startswith(ZIP_MAGIC):
            raise ValueError(f"no PyTorch file: it starts with {start!r}")
        return _read_zip(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_zip(path: Path) -> Any:
    records = _records(path)
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip archive, but not one of torch.save: no data.pkl in it")
    root = pickles[0].removesuffix("data.pkl")
    # torch.save can be told to leave checksums out; then they are 0 throughout.
    has_checksums = any(record.crc32 for record in records.values())

    def read(record: Record) -> bytes:
        data = _read_record(path, record)
        if has_checksums and zlib.crc32(data) != record.crc32:
            raise ValueError("it is damaged: a checksum differs")
        return data

    byteorder = records.get(root + "byteorder")
    if byteorder is not None and read(byteorder) != b"little":
        raise ValueError("it was written on a big-endian machine")
    in_part = set()  # storages that a tensor has a part of, whose bytes alone have no checksum

    def persistent_load(pid) -> Storage:
        kind, storage_type, key, *_ = pid
        if kind != "storage" or type(key) is not str:
            raise TypeError("no storage")
        return Storage(records[f"{root}data/{key}"], DTYPES[STORAGE_DTYPES[str(storage_type)]])

    def rebuild_tensor(storage, start, shape, strides, *_) -> StoredTensor:
        tensor = _tensor(path, storage, start, shape, strides, has_checksums)
        if has_checksums and tensor.crc32 is None and storage.record not in in_part:
            read(storage.record)
            in_part.add(storage.record)
        return tensor

    constructors: dict[str, Callable[..., Any]] = {
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        **dict.fromkeys(("collections.OrderedDict", *ATTRIBUTE_DICTS), lambda: {}),
    }
    return read_pickle(
        read(records[pickles[0]]), constructors=constructors, persistent_load=persistent_load
    )


def _records(path: Path) -> dict[str, Record]:
    """The archive's entries by name, each checked to lie within the file."""
    file_size = path.stat().st_size
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("its entries are compressed, which torch.save never does")
                if not 0 <= entry.header_offset < file_size:
                    raise ValueError("an entry lies outside the file")
                file.seek(entry.header_offset)
                name_size, extra_size = struct.unpack("<26x2H", file.read(30))
                offset = entry.header_offset + 30 + name_size + extra_size
                if offset + entry.file_size > file_size:
                    raise ValueError("an entry lies outside the file")
                records[entry.filename] = Record(offset, entry.file_size, entry.CRC)
    except (zipfile.BadZipFile, struct.error, NotImplementedError, OverflowError) as error:
        raise ValueError(f"the zip archive is cut off or damaged ({error})") from None
    if sum(record.size for record in records.values()) > file_size:
        raise ValueError("its entries overlap")
    return records


def _read_record(path: Path, record: Record) -> bytes:
    with path.open("rb") as file:
        file.seek(record.offset)
        return file.read(record.size)


def _tensor(path, storage, start, shape, strides, has_checksums) -> StoredTensor:
    numbers = (start, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 32:
        raise TypeError("no tensor")
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise TypeError("no tensor")
    itemsize = storage.dtype.itemsize
    elements = storage.record.size // itemsize
    # Strides may be 0, as after `expand`: then the tensor has more elements than are stored for it.
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > MAX_ELEMENTS or (math.prod(shape) and start + span > elements):
        raise ValueError(
            f"a tensor of shape {shape} needs more than its {elements} stored elements"
        )
    whole = math.prod(shape) and start == 0 and span * itemsize == storage.record.size
    return StoredTensor(
        path=path,
        offset=storage.record.offset + start * itemsize,
        dtype=storage.dtype,
        shape=tuple(shape),
        strides=None if _is_contiguous(shape, strides) else tuple(strides),
        crc32=storage.record.crc32 if whole and has_checksums else None,
    )


def _is_contiguous(shape, strides) -> bool:
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def _read_old_format(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise ValueError(
            "it has the format from before PyTorch 1.6, which needs torch: install the [torch] "
            "extra, pip install 'perceiver-ar-jax[torch]'"
        ) from None
    try:
        with torch.serialization.safe_globals([(dict, name) for name in ATTRIBUTE_DICTS]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise ValueError(f"refused: its pickle names {named[1]}") from None
        raise ValueError(f"damaged: torch.load says {str(error)[:100]!r}") from None
    return _with_arrays(loaded, depth=2)


def _with_arrays(value: Any, depth: int) -> Any:
    """Turns torch's tensors into arrays in a state dict, or in a dict that holds one."""
    import torch

    if isinstance(value, dict) and depth:
        return {name: _with_arrays(item, depth - 1) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return value.numpy()
