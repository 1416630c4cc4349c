"""Reads by threads what will be needed soon."""

import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

NUM_THREADS = 16


class ReadAhead:
    """Calls `read(place)` in a pool of threads, for places that were requested before.

    An error is raised where the place is taken. What is requested is kept until it is taken, so
    whoever requests bounds the memory.
    """

    def __init__(self, read: Callable[[int], Any]):
        self._read = read
        self._pool = futures.ThreadPoolExecutor(NUM_THREADS)
        self._pending = {}

    def request(self, place: int) -> None:
        """Begins to read, unless that was requested already."""
        if place not in self._pending:
            self._pending[place] = self._pool.submit(self._read, place)

    def take(self, place: int) -> Any:
        """What is at the place; waits until it has been read."""
        self.request(place)
        return self._pending.pop(place).result()

    def close(self) -> None:
        """Gives up what has not begun, and waits for what has."""
        if not sys.is_finalizing():  # then the pool has ended already
            self._pool.shutdown(wait=True, cancel_futures=True)


def read_in_order(read: Callable[[int], Any], count: int) -> Iterator[Any]:
    """`read(0)`, ..., `read(count - 1)`, some of them read ahead."""
    ahead = ReadAhead(read)
    try:
        for place in range(count):
            for soon in range(place, min(place + NUM_THREADS, count)):
                ahead.request(soon)
            yield ahead.take(place)
    finally:
        ahead.close()
