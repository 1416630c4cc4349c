"""How far a long evaluation is, on standard error, which leaves standard output to the results."""

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.console
import rich.progress

T = TypeVar("T")
SECONDS_PER_LINE = 10


def tracked(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar and ETA on a terminal, otherwise a line every ten seconds.

    An item counts as done when the next is asked for. So what reads ahead, as one_at_a_time does,
    is tracked by its results. The first, which includes compilation, is left out of the ETA.
    """
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
        yield from rich.progress.track(items, what, total, console=console, transient=True)
        return
    start = printed = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == 1:
            start = now
        if now - printed >= SECONDS_PER_LINE:
            printed = now
            print(f"{what}: {done}/{total}{_eta(done - 1, total - done, now - start)}",
                  file=sys.stderr, flush=True)  # fmt: skip


def _eta(done, left, seconds):
    if not done:
        return ""
    return f"  ETA {datetime.timedelta(seconds=round(seconds / done * left))}"
