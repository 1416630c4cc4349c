"""Joins the processes of a run on several hosts, before any device is touched."""

import glob
import importlib.util
import os
from collections.abc import Mapping

import jax

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
JOIN_SECONDS = 300


def join_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Calls `jax.distributed.initialize` where this process is, or may be, one of several.

    That is so on a TPU host, and under SLURM or Open MPI with more than one task; JAX then finds
    the others by itself. Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process.

    Raises:
      ValueError: some of the three are set, but not all.
    """
    given = [name for name in BY_HAND if environment.get(name)]
    if given and len(given) < len(BY_HAND):
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise ValueError(f"{', '.join(given)} set, but not {missing}: several processes need all")
    if not given and not _launched_with_others(environment) and not _on_tpu_host():
        return
    if environment.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, count, index = (environment.get(name) for name in BY_HAND)
    jax.distributed.initialize(
        address,
        int(count) if given else None,
        int(index) if given else None,
        initialization_timeout=JOIN_SECONDS,
    )


def _launched_with_others(environment):
    return any(int(environment.get(name, 1)) > 1 for name in TASK_COUNTS)


def _on_tpu_host():
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None
