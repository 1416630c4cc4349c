"""Starts programs in several processes that join, as hosts of a pod do."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from quick_compilation import xla_flags

from perceiver_ar_jax.parallel.processes import BY_HAND

ROOT = Path(__file__).resolve().parent.parent
STUCK_SECONDS = 300  # far beyond what any of them takes


def start_processes(
    workdir: Path, flags: list[str], *, processes: int, devices: int, differing: str | None = None
) -> list[subprocess.Popen]:
    """Starts train.py; `differing` is a flag that the last process gets alone."""
    command = ["train.py", f"--workdir={workdir}", *flags]
    commands = [command] * (processes - 1) + [command + ([differing] if differing else [])]
    return start_joined(commands, devices=devices)


def start_joined(commands: Sequence[list], *, devices: int) -> list[subprocess.Popen]:
    """Starts one Python process for each command, all joined by jax.distributed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
    }
    started = []
    for index, command in enumerate(commands):
        joined = dict(zip(BY_HAND, (address, str(len(commands)), str(index)), strict=True))
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment | joined,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def wait(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each printed on stderr."""
    printed = outputs(processes)
    return [process.returncode for process in processes], [errors for _, errors in printed]


def outputs(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """What each printed on stdout and stderr; ends all of them when one is stuck."""
    try:
        return [process.communicate(timeout=STUCK_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
