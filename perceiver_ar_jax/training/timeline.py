"""Where the time of a run goes."""

import time
from collections.abc import Callable

START, STEPS, EVALUATION, SAVE = KINDS = ("start", "steps", "evaluation", "save")


class Timeline:
    """Gives every second since it was made to one kind of work.

    Attributes:
      seconds: so far, by kind. Waiting for data is part of "steps".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._mark = clock()

    def spend(self, kind: str) -> float:
        """Counts what passed since the last call as time of this kind; returns it, in seconds."""
        now = self.clock()
        passed, self._mark = now - self._mark, now
        self.seconds[kind] += passed
        return passed

    @property
    def total(self) -> float:
        """Seconds since it was made, including those that no call has counted yet."""
        return sum(self.seconds.values()) + self.clock() - self._mark
