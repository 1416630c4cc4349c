"""SIGTERM and Ctrl-C: a run saves the step it is at and leaves."""

import os
import signal

import jax
from jax.experimental import multihost_utils

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


class Preemption:
    """Notes SIGTERM or Ctrl-C; a second one ends the process at once.

    Of several processes one may be told alone, and all must leave after the same step: there,
    JAX itself listens to SIGTERM, and its coordinator says which step is the last.
    """

    def __init__(self):
        self.exit_code = None  # set once the run is to leave
        self._alone = jax.process_count() == 1
        self._noted = None
        signals = EXIT_CODES if self._alone else [signal.SIGINT]
        self._before = {number: signal.signal(number, self._note) for number in signals}

    @property
    def is_noted(self) -> bool:
        """Whether a process that is alone has been told to leave."""
        return self._alone and self._noted is not None

    def reached(self, step: int) -> bool:
        """Whether the run is to leave before this step; all processes ask at every step."""
        if self._alone:
            leave = self.is_noted
        else:
            leave = multihost_utils.reached_preemption_sync_point(step)
        if leave:
            self.exit_code = EXIT_CODES[self._noted or signal.SIGTERM]
            _end_at_once_from_now_on()
        return leave

    def close(self) -> None:
        """Gives the signals back."""
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
