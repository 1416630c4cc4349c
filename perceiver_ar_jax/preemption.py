"""SIGTERM and Ctrl-C: a run saves its current step and exits."""

import os
import signal

import jax
from jax.experimental import multihost_utils

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Preemption:
    """Notes SIGTERM or Ctrl-C; a second one ends the process at once.

    Of several processes only one may get the signal, and all must stop after the same step: JAX
    itself listens to SIGTERM there, and its coordinator decides which step is the last.
    """

    def __init__(self):
        self.exit_code = None  # set once the run is to stop
        self._alone = jax.process_count() == 1
        self._noted = None
        signals = EXIT_CODES if self._alone else [signal.SIGINT]
        self._before = {number: signal.signal(number, self._note) for number in signals}

    @property
    def is_noted(self) -> bool:
        """Whether a single process has been told to stop."""
        return self._alone and self._noted is not None

    def reached(self, step: int) -> bool:
        """Whether to stop before this step; every process asks at every step."""
        if self._alone:
            leave = self.is_noted
        else:
            leave = multihost_utils.reached_preemption_sync_point(step)
        if leave:
            self.exit_code = EXIT_CODES[self._noted or signal.SIGTERM]
            _end_at_once_from_now_on()
        return leave

    def close(self) -> None:
        """Restores the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self._noted = number
        if self._alone:
            _end_at_once_from_now_on()
        else:  # Ctrl-C, passed on to what JAX listens to
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


def _end_at_once_from_now_on():
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_DFL)
