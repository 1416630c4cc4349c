"""What a process does when another one is lost: with an imitation of JAX's key-value store."""

import subprocess
import sys

import pytest
from conftest import ROOT

from perceiver_ar_jax.parallel.peers import TRY_AGAIN

# Process 1 of 3; `said` is what the two others have in the store, changed by `step` at each look.
PROGRAM = """
import json, os, signal, sys, time
from perceiver_ar_jax.parallel.peers import FOLDER, Peers

class Store:
    def __init__(self):
        self.said = {0: {"host": "a", "n": 0}, 2: {"host": "c", "n": 0}}
    def key_value_set(self, key, value, allow_overwrite):
        self.own = json.loads(value)
    def key_value_dir_get(self, folder):
        STEP
        found = self.said | {1: self.own}
        return [(f"{FOLDER}{index}", json.dumps(x)) for index, x in found.items()]

def beat(store, *indices):
    for index in indices:
        store.said[index]["n"] += 1

store = Store()
peers = Peers(store, address="localhost:9", index=1, count=3, lost_after=1.2)
MAIN
"""


def run(step: str, main: str) -> tuple[int, str]:
    code = PROGRAM.replace("STEP", step).replace("MAIN", main)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stderr


END = f"leaving with exit code {TRY_AGAIN}: start all processes again\n"


@pytest.mark.parametrize(
    ("step", "main", "line"),
    [
        ("beat(self, 0)", "time.sleep(30)", "process 2 on c is lost: no sign of life for 1 s"),
        (
            "beat(self, 0); self.said[2] |= {'code': 2}",
            "time.sleep(30)",
            "process 2 on c has ended with exit code 2; its output says why",
        ),
        ("raise OSError", "time.sleep(30)", "process 0 has not answered for 1 s"),
        (
            "beat(self, 0)",
            "peers.wait_for_verdict(); sys.exit(2)",
            "process 2 on c is lost: no sign of life for 1 s",
        ),
        (
            "beat(self, 0, 2)",
            "time.sleep(0.2); os.abort()",
            "process 0 on a is lost: its port is closed",
        ),
    ],
    ids=["killed", "failed", "coordinator unreachable", "an error before", "JAX aborts"],
)
def test_the_lost_process_is_named_in_one_line(step, main, line):
    assert run(step, main) == (TRY_AGAIN, f"{line}; {END}")


def test_an_error_in_all_processes_keeps_its_exit_code_and_nobody_waits():
    step = "beat(self, 0, 2); [x.update(fails=True) for x in self.said.values()]"
    assert run(step, "peers.wait_for_verdict(); peers.end(2)") == (2, "")


def test_a_run_that_is_over_keeps_its_exit_code_when_process_0_leaves_first():
    main = "import threading; threading.Timer(0.5, os.abort).start(); peers._own['code'] = 143"
    assert run("beat(self, 0, 2)", main + "; time.sleep(30)") == (143, "")


def test_processes_that_ended_well_are_not_missed():
    step = "beat(self, 0); self.said[2] |= {'code': 0}"
    assert run(step, "time.sleep(2); peers.end(0)") == (0, "")
