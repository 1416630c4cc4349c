"""The other processes of a run: when one is lost, the rest leave with one line and exit code 75."""

import atexit
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

LOST_AFTER = 60.0  # seconds
BEATS = 12  # within that time
TRY_AGAIN = os.EX_TEMPFAIL
ENDED_WELL = (0, 130, 143)  # a process that ended so is not missed
FOLDER = "perceiver_ar_jax/processes/"


class Peers:
    """Exchanges signs of life with the other processes, through the key-value store of JAX.

    JAX by itself aborts the process, with exit code -6 and a C++ stack trace: after 100 s when
    another process is lost, at once when process 0 is. (Its `missed_heartbeat_callback` cannot be
    used: in jaxlib 0.10 it fails to convert its argument, and aborts too.) So two threads notice
    the first case earlier, and a handler of SIGABRT catches the second.

    Args:
      client: JAX's client of the coordinator, which runs in process 0.
      address: host:port of the coordinator.
      index: of this process.
      count: of all processes.
      lost_after: seconds without a sign of life after which a process is lost.
    """

    def __init__(self, client: Any, *, address: str, index: int, count: int, lost_after: float):
        self._client, self._address, self._index = client, address, index
        self._lost_after, self._pause = lost_after, lost_after / BEATS
        self._own = {"host": os.uname().nodename, "exchanges": 0, "fails": False, "code": None}
        others = [i for i in range(count) if i != index]
        self._others: dict[int, dict[str, Any]] = {i: {} for i in others}  # what each said last
        self._missed = dict.fromkeys(others, 0)  # beats since it said something new
        self._waited = 0  # beats since the coordinator answered
        self._wake, self._exchanged, self._stopped = (threading.Event() for _ in range(3))
        self._leaving = threading.Lock()
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)  # C keeps no reference
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        self._threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self._exchange, self._watch_coordinator)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._stop)  # before JAX leaves, and before Python ends daemon threads

    def wait_for_verdict(self) -> None:
        """After an error that a lost process may have caused: if so, the watch ends this process.

        Returns when all processes have failed, or when none was lost in the usual time.
        """
        self._own["fails"] = True
        self._exchange_until(
            lambda other: other.get("fails") or other.get("code") is not None, BEATS + 3
        )

    def end(self, code: int) -> NoReturn:
        """Ends this process; one that failed does not wait for the others, as JAX would."""
        with self._leaving:  # for ever, if this process is leaving already
            self._own["code"] = code
        if code in ENDED_WELL:
            sys.exit(code)
        self._exchange_until(lambda other: self._index != 0 or other.get("code") is not None, 4)
        _exit(code)

    def _exchange_until(self, condition, beats: float) -> None:
        """Exchanges until it holds for all others, at most for so many beats."""
        until = time.monotonic() + beats * self._pause
        while True:
            self._exchanged.clear()
            self._wake.set()
            self._exchanged.wait(self._pause)
            if all(map(condition, self._others.values())) or time.monotonic() > until:
                return
            time.sleep(self._pause / 10)

    def _exchange(self):
        next_beat = 0.0
        while not self._stopped.is_set():
            is_beat = time.monotonic() >= next_beat
            if is_beat:
                next_beat = time.monotonic() + self._pause
            self._own["exchanges"] += 1
            try:
                own = json.dumps(self._own)
                self._client.key_value_set(f"{FOLDER}{self._index}", own, allow_overwrite=True)
                found = self._client.key_value_dir_get(FOLDER)
            except Exception:  # no answer, for whatever reason; `_watch_coordinator` counts
                found = []
            if found:
                self._waited = 0
                self._note(found, is_beat)
                self._leave_if_lost()
            self._exchanged.set()
            self._wake.wait(max(0.0, next_beat - time.monotonic()))
            self._wake.clear()

    def _note(self, found, is_beat):
        said = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}
        for index, before in self._others.items():
            now = said.get(index, {})
            if now != before:
                self._missed[index] = 0
            elif is_beat:
                self._missed[index] += 1
            self._others[index] = now

    def _watch_coordinator(self):
        """Counts beats, not seconds: a machine that was suspended has not missed an answer."""
        while not self._stopped.wait(self._pause):
            self._waited += 1
            if self._waited > BEATS and self._index != 0:
                self._leave(0, f"has not answered for {self._lost_after:.0f} s")

    def _leave_if_lost(self):
        for index, missed in self._missed.items():
            if missed >= BEATS and self._others[index].get("code") is None:
                self._leave(index, f"is lost: no sign of life for {self._lost_after:.0f} s")
        for index, missed in self._missed.items():
            code = self._others[index].get("code")
            # Two beats, in which the same error may end this process too.
            if code not in (None, *ENDED_WELL) and missed >= 2 and self._own["code"] is None:
                self._leave(index, f"has ended with exit code {code}; its output says why")

    def _leave(self, index: int, problem: str) -> NoReturn:
        with self._leaving:  # one line, of the first thread that gets here
            host = self._others.get(index, {}).get("host")
            print(
                f"process {index}{f' on {host}' if host else ''} {problem}; leaving with exit code "
                f"{TRY_AGAIN}: start all processes again",
                file=sys.stderr,
            )
            if self._index == 0:  # without it the others would be aborted, and name it
                time.sleep(3 * self._pause)
            _exit(TRY_AGAIN)

    def _abort(self, _: int) -> None:
        """On SIGABRT; when it returns, the process aborts."""
        if self._own["code"] is not None:  # the run is over: process 0 was only faster to leave
            _exit(self._own["code"])
        for index, missed in self._missed.items():
            if missed >= BEATS / 2:
                self._leave(index, "is lost: JAX has ended the run")
        if self._index != 0 and not _is_open(self._address):
            self._leave(0, "is lost: its port is closed")

    def _stop(self):
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._pause)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True
