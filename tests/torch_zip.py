"""Writes files in PyTorch's zip format without PyTorch, so that tests can break them at will."""

import struct
import zipfile

import numpy as np

STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def text(value: str) -> bytes:
    """A str in pickle's protocol 2."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """A 32-bit int in pickle's protocol 1."""
    return b"J" + struct.pack("<i", value)


def numbers(values) -> bytes:
    """A tuple of ints."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key: str, dtype: str, shape, strides, start: int = 0, elements: int = 0) -> bytes:
    """A tensor, the way torch.save pickles it; its data are the archive's entry of that key."""
    storage = b"(" + text("storage") + b"ctorch\n" + STORAGES[dtype].encode() + b"\n"
    storage += text(key) + text("cpu") + number(elements) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    place = number(start) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89" + hooks + b"tR"


def mapping(items: dict[str, bytes]) -> bytes:
    """A dict of things that are pickled already."""
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def write_archive(path, pickled: bytes, storages: dict[str, bytes] | None = None, **options):
    """The archive of torch.save around one pickled object, without its protocol and stop bytes."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)


def write_state_dict(path, arrays: dict[str, np.ndarray]):
    """What torch.save writes for a dict of contiguous tensors."""
    pickled, storages = {}, {}
    for index, (name, array) in enumerate(arrays.items()):
        strides = [step // array.itemsize for step in array.strides]
        pickled[name] = tensor(str(index), array.dtype.name, array.shape, strides, 0, array.size)
        storages[str(index)] = array.tobytes()
    write_archive(path, mapping(pickled), storages)
