"""Starts train.py in several processes that join, as hosts of a pod do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from perceiver_ar_jax.parallel.processes import BY_HAND

ROOT = Path(__file__).resolve().parent.parent


def start_processes(
    workdir: Path, flags: list[str], *, processes: int, devices: int, differing: str | None = None
) -> list[subprocess.Popen]:
    """`differing` is a flag that the last process gets alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    started = []
    for index in range(processes):
        command = [sys.executable, "train.py", f"--workdir={workdir}", *flags]
        if differing and index == processes - 1:
            command.append(differing)
        joined = dict(zip(BY_HAND, (address, str(processes), str(index)), strict=True))
        started.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | joined,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def wait(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each said on stderr."""
    said = [process.communicate(timeout=500)[1] for process in processes]
    return [process.returncode for process in processes], said
