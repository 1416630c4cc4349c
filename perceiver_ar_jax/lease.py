"""A lease on the workdir of a run in a bucket, where there are no file locks."""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from perceiver_ar_jax.data.storage import read_object, write_object

LEASE_SECONDS = 60.0
RENEWALS = 6  # within that time
BAD_INPUT, TRY_AGAIN = 2, os.EX_TEMPFAIL


@contextlib.contextmanager
def leased(path: str, *, seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Holds a lease: an object that its holder writes again and again while it is alive.

    A write names the generation of the object that it replaces, so that of two writers one fails.
    Whoever finds the object of another watches it: if it does not change for `seconds`, its holder
    is dead, and the lease is taken over. No clocks are compared.

    A holder that loses the lease, which takes a pause of more than `seconds`, ends its process:
    with exit code 2 if another run has it, with 75 if the bucket cannot be reached.

    Args:
      path: of the object, gs://BUCKET/NAME.
      seconds: after which the lease of a dead holder ends.

    Raises:
      ValueError: another run holds it.
      StorageError: the bucket cannot be reached.
    """
    holder = {"holder": uuid.uuid4().hex, "host": os.uname().nodename, "process": os.getpid()}
    lease = _Lease(path, json.dumps(holder).encode(), seconds)
    lease.take()
    thread = threading.Thread(target=lease.renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        lease.released.set()
        thread.join()
        write_object(path, None, generation=lease.generation)


class _Lease:
    def __init__(self, path, content, seconds):
        self._path, self._content, self._seconds = path, content, seconds
        self.generation = 0
        self.released = threading.Event()

    def take(self):
        while (found := read_object(self._path)) is not None:
            content, generation = found
            holder = _describe(content)
            print(f"waiting {self._seconds:.0f} s for a sign of life of {holder}", file=sys.stderr)
            until = time.monotonic() + self._seconds
            while time.monotonic() < until and found is not None:
                time.sleep(self._seconds / RENEWALS / 2)
                found = read_object(self._path)
                if found is not None and found[1] != generation:
                    raise ValueError(f"{_describe(found[0])} is writing to it: {self._path}")
            if found is not None and self._write(generation):
                return
        if not self._write(0):
            raise ValueError(f"another run has just begun to write to it: {self._path}")

    def renew(self):
        renewed = time.monotonic()
        while not self.released.wait(self._seconds / RENEWALS):
            try:
                if self._write(self.generation):
                    renewed = time.monotonic()
                    continue
                self._end(BAD_INPUT, "another run has taken over")
            except Exception as error:
                if time.monotonic() - renewed > self._seconds:
                    self._end(TRY_AGAIN, f"cannot be renewed: {error}")

    def _write(self, generation) -> bool:
        written = write_object(self._path, self._content, generation=generation)
        if written is None:  # perhaps it was, and the answer got lost
            found = read_object(self._path)
            if found is None or found[0] != self._content:
                return False
            written = found[1]
        self.generation = written
        return True

    def _end(self, code, problem):
        if not self.released.is_set():
            print(f"the lease {self._path}: {problem}; exit code {code}", file=sys.stderr)
            os._exit(code)


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"another run (host {holder['host']}, process {holder['process']})"
    except (ValueError, KeyError, TypeError):
        return "another run"
