"""Byte ranges of files, local or in a bucket; what the network loses is asked for again."""

import asyncio
import functools
import inspect
import os
import random
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import fsspec
from etils import epath

MAX_ATTEMPTS = 8
FIRST_PAUSE = 0.25  # seconds; doubles with every attempt
STALL_SECONDS = 20.0  # a request that takes longer has failed
_TRANSIENT_CODES = (408, 429, *range(500, 600))


class StorageError(Exception):
    """A file could not be read although every request was repeated; trying later may help."""

    exit_code = os.EX_TEMPFAIL


class _Counter:
    """Counts the repeated requests of this process."""

    def __init__(self):
        self._lock = threading.Lock()
        self._count = 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        """The count since the last call."""
        with self._lock:
            count, self._count = self._count, 0
        return count


retries = _Counter()


def is_remote(path: str) -> bool:
    """Whether the path names an object in a bucket."""
    return "://" in path


def read_range(path: str, start: int, end: int) -> bytes:
    """The bytes from `start` to `end` of a file that has at least `end` bytes.

    A request to a bucket that fails, stalls or returns too little is repeated with growing pauses.

    Raises:
      ValueError: the file is missing, shorter, or may not be read.
      StorageError: the last attempt failed too.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), end - start, start)
        if len(data) != end - start:
            raise ValueError(f"{path} ends before byte {end:,}")
        return data

    def request() -> bytes:
        data = _call(path, "cat_file", start=start, end=end)
        if len(data) != end - start:
            raise ConnectionError(f"{len(data):,} bytes instead of {end - start:,}")
        return data

    return _retried(f"{path}, byte {start:,}", request)


def file_sizes(paths: Sequence[str]) -> list[int | None]:
    """The size of each file, None where there is none; one listing per folder of a bucket."""
    folders = defaultdict(dict)
    for folder in {path.rpartition("/")[0] for path in paths if is_remote(path)}:
        entries = _retried(folder, functools.partial(_call, folder, "ls", detail=True))
        for entry in entries:
            folders[folder][entry["name"].rpartition("/")[2]] = entry["size"]

    def size(path: str) -> int | None:
        if is_remote(path):
            folder, _, name = path.rpartition("/")
            return folders[folder].get(name)
        return epath.Path(path).stat().length if epath.Path(path).exists() else None

    return [size(path) for path in paths]


def read_object(path: str) -> tuple[bytes, int] | None:
    """The bytes and the generation of an object in gs://; None if there is none.

    Raises:
      ValueError: it may not be read.
      StorageError: the last attempt failed too.
    """
    url = _object_url(path)  # gcsfs's own calls may answer from a cache

    def request():
        try:
            generation = int(_call(path, "call", "GET", url, json_out=True)["generation"])
            _, data = _call(path, "call", "GET", url, alt="media", generation=str(generation))
            return data, generation
        except FileNotFoundError:
            return None

    return _retried(path, request)


def write_object(path: str, data: bytes | None, *, generation: int) -> int | None:
    """Writes an object in gs:// if its generation is the given one; 0: if there is none.

    Args:
      path: of the object.
      data: what it shall hold; None deletes it.
      generation: what it must have now.

    Returns:
      Its new generation (0 once deleted), or None if it has another than the given one.

    Raises:
      ValueError: it may not be written.
      StorageError: the last attempt failed too.
    """
    bucket, _, name = path.partition("://")[2].partition("/")
    storage = _file_system(path)
    condition = {"ifGenerationMatch": str(generation)}

    def request():
        try:
            if data is None:
                _call(path, "call", "DELETE", _object_url(path), **condition)
                return 0
            url = f"{storage._location}/upload/storage/v1/b/{bucket}/o"
            options = {"uploadType": "media", "name": name, "data": data, "json_out": True}
            return int(_call(path, "call", "POST", url, **options, **condition)["generation"])
        except (FileExistsError, FileNotFoundError):  # gcsfs's words for 412 and 404
            return None

    return _retried(path, request)


def _object_url(path: str) -> str:
    bucket, _, name = path.partition("://")[2].partition("/")
    return f"{_file_system(path)._location}/storage/v1/b/{bucket}/o/{quote(name, safe='')}"


def _retried(what: str, request: Callable[[], Any]) -> Any:
    for attempt in range(MAX_ATTEMPTS):
        if attempt:
            retries.add()
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        try:
            return request()
        except Exception as error:  # network libraries raise exceptions of many unrelated types
            problem = _describe(error)
            if not _is_transient(error):
                raise ValueError(f"cannot read {what}: {problem}") from error
    raise StorageError(f"{what}: {MAX_ATTEMPTS} attempts failed, the last with {problem}")


def _call(path: str, method: str, *others, **arguments) -> Any:
    file_system = _file_system(path)
    others = others or (path,)
    if not file_system.async_impl:
        return getattr(file_system, method)(*others, **arguments)

    async def with_limit():
        coroutine = getattr(file_system, f"_{method}")(*others, **arguments)
        return await asyncio.wait_for(coroutine, STALL_SECONDS)

    return asyncio.run_coroutine_threadsafe(with_limit(), file_system.loop).result()


_file_systems: dict[str, fsspec.AbstractFileSystem] = {}
_file_systems_lock = threading.Lock()


def _file_system(path: str) -> fsspec.AbstractFileSystem:
    protocol = path.partition("://")[0].replace("gs", "gcs")  # the name that fsspec prefers
    with _file_systems_lock:
        if protocol not in _file_systems:
            kind = fsspec.get_filesystem_class(protocol)
            # Of gcsfs the plain client: its subclass first asks by gRPC what kind of bucket it is.
            kind = next((base for base in kind.mro() if base.__module__ == "gcsfs.core"), kind)
            new = kind(skip_instance_cache=True)
            if hasattr(new, "_request"):  # gcsfs would retry by itself, uncounted
                new._request = types.MethodType(inspect.unwrap(type(new)._request), new)
            _file_systems[protocol] = new
        return _file_systems[protocol]


def _is_transient(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    code = getattr(error, "code", None)  # of gcsfs's HttpError
    if code is not None:
        return int(code) in _TRANSIENT_CODES
    return not isinstance(error, ValueError) and "Forbidden" not in str(error)


def _describe(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])
