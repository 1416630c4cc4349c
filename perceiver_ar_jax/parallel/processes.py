"""The processes of a run on several hosts: joining, agreeing and telling each other."""

import collections
import glob
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
JOIN_SECONDS = 300


def join_processes(
    environment: Mapping[str, str] = os.environ, *, seconds: float = JOIN_SECONDS
) -> None:
    """Calls `jax.distributed.initialize` where this process is, or may be, one of several.

    That is so on a TPU host, and under SLURM or Open MPI with more than one task; JAX then finds
    the others by itself. Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process. Where the others do not come in time,
    the process ends with exit code 2 and says how many are there.

    Raises:
      ValueError: some of the three are set, but not all.
    """
    given = [name for name in BY_HAND if environment.get(name)]
    if given and len(given) < len(BY_HAND):
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise ValueError(f"{', '.join(given)} set, but not {missing}: several processes need all")
    if jax.distributed.is_initialized():
        return
    if not given and not _launched_with_others(environment) and not _on_tpu_host():
        return
    if environment.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, count, index = (environment.get(name) for name in BY_HAND)
    joined = threading.Event()
    threading.Thread(target=_watch, args=(joined, seconds), daemon=True).start()
    try:
        jax.distributed.initialize(
            address,
            int(count) if given else None,
            int(index) if given else None,
            initialization_timeout=int(seconds) + 60,  # JAX aborts; the watch is to speak before
        )
    finally:
        joined.set()


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """A JSON value of each process, in their order; all must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(function: Callable[[], Any]) -> Any:
    """What the function gives in the first process, in all of them; all must call it.

    Raises:
      ValueError: what went wrong in the first process, in all of them.
    """
    result, problem = None, None
    if is_first():
        try:
            result = function()
        except (ValueError, OSError) as error:
            problem = str(error)
    result, problem = gather([result, problem])[0]
    if problem is not None:
        raise ValueError(problem)
    return result


def one_at_a_time(program: Callable[[Any], Any], inputs: Iterable[Any]) -> Iterator[Any]:
    """The results of a compiled program for each input, on the host.

    The next input is prepared while the program runs, but the program is dispatched again only
    once it has finished. Collectives must start in the same order on all processes, and what is in
    flight together has no order: over gloo, some thirty evaluation steps in flight never end.
    """
    running = None
    for x in inputs:
        if running is not None:
            yield jax.device_get(running)
        running = program(x)
    if running is not None:
        yield jax.device_get(running)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compares what processes must have in common; all must call it.

    Raises:
      ValueError: in all of them, naming the odd process, its host and the facts that differ.
    """
    host = os.uname().nodename
    everyone = gather({"host": host, "facts": {name: str(x) for name, x in facts.items()}})
    problems = []
    for name in facts:
        values = [each["facts"].get(name) for each in everyone]
        usual = collections.Counter(values).most_common(1)[0][0]
        problems += [
            f"process {index} on {each['host']} has {name} {value}, the others {usual}"
            for index, (each, value) in enumerate(zip(everyone, values, strict=True))
            if value != usual
        ]
    if problems:
        raise ValueError("processes disagree: " + "; ".join(problems))


def _launched_with_others(environment):
    return any(int(environment.get(name, 1)) > 1 for name in TASK_COUNTS)


def _on_tpu_host():
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _watch(joined: threading.Event, seconds: float) -> None:
    """Says how many have joined, since JAX is silent until it aborts the process."""
    from jax._src.distributed import global_state  # nothing public knows it before all are there

    start = time.monotonic()
    while not joined.wait(min(20, seconds / 2)):
        count, address = global_state.num_processes, global_state.coordinator_address
        late = time.monotonic() - start > seconds
        if not address:
            state = "JAX has not found the other processes yet"
        elif global_state.process_id == 0:
            here = min(_connections(int(address.rsplit(":", 1)[1])), count)
            state = f"{here} of {count} processes joined"
        else:
            state = f"not all of {count} processes have reached process 0 at {address}"
            late = time.monotonic() - start > seconds + 5  # the first one, which counts, is first
        print(f"waiting: {state}", file=sys.stderr, flush=True)
        if late:
            print(
                f"gave up after {seconds:.0f} s; start the same command on every host "
                f"(outside of TPU pods, SLURM and Open MPI with {', '.join(BY_HAND)} set)",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)


def _connections(port: int) -> int:
    """Established connections to a port of this host, as Linux lists them."""
    established, at = "01", f":{port:04X}"
    lines = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines += Path(table).read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(at) and line.split()[3] == established for line in lines)
