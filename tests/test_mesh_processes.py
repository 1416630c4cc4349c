"""Two processes of four devices each train as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sharded_training import mesh_of, train

from perceiver_ar_jax.parallel import join_processes
from perceiver_ar_jax.parallel.processes import BY_HAND
from perceiver_ar_jax.training.checksums import checksums

TESTS = Path(__file__).parent


def run_two_processes(axes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    path = f"{TESTS.parent}{os.pathsep}{TESTS}"
    processes = [
        subprocess.Popen(
            [sys.executable, TESTS / "multihost_training.py", json.dumps(axes)],
            env=os.environ
            | flags
            | {"PYTHONPATH": path}
            | dict(zip(BY_HAND, (address, "2", str(index)), strict=True)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def test_two_processes_train_as_one_does_and_agree_on_checksums():
    axes = {"data": 2, "fsdp": 4}
    first, second = run_two_processes(axes)
    assert first == second
    metrics, state = train(mesh_of(**axes))
    np.testing.assert_allclose(first["metrics"], metrics, rtol=1e-5)
    assert first["checksums"].keys() == checksums(state.params).keys()


def test_half_given_process_variables_are_refused():
    with pytest.raises(ValueError, match="not JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        join_processes({"JAX_COORDINATOR_ADDRESS": "host:1"})


def test_a_process_alone_joins_nobody():
    join_processes({})
