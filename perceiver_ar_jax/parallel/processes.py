"""The processes of a run on several hosts: joining, exchanging values, comparing settings."""

import collections
import functools
import glob
import importlib.util
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from perceiver_ar_jax.parallel.peers import LOST_AFTER, Peers

BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
JOIN_SECONDS = 300

_peers: Peers | None = None


def join_processes(
    environment: Mapping[str, str] = os.environ,
    *,
    seconds: float = JOIN_SECONDS,
    lost_after: float = LOST_AFTER,
) -> None:
    """Calls `jax.distributed.initialize` if this process is, or may be, one of several.

    On a TPU host, and under SLURM or Open MPI with more than one task, JAX finds the other
    processes. Elsewhere set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in each process. If the others do not join in time, the process prints how many
    have joined and ends with exit code 2. From then on, if one of them gives no sign of life for
    `lost_after` seconds or ends with an error, the process prints which and ends with exit code 75.

    Raises:
      ValueError: some of the three variables are set, but not all.
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
            initialization_timeout=int(seconds) + 60,  # JAX aborts; the watch reports first
        )
    finally:
        joined.set()
    _watch_peers(lost_after)


def connect_devices(mesh: Mesh) -> None:
    """Lets the devices of each axis of the mesh, and of several, find each other; all must call it.

    Over gloo, on CPUs, devices connect when they first communicate, and a process that comes more
    than 30 s after another, because it still compiles, is too late: the run would end.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    from jax._src.distributed import global_state  # no public barrier without a collective

    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    groups = [x for n in range(len(axes)) for x in itertools.combinations(axes, n + 1)]
    for group in groups:
        add = functools.partial(jax.lax.psum, axis_name=group)
        everywhere = jax.shard_map(add, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        compiled = jax.jit(everywhere).lower(jax.ShapeDtypeStruct((), np.float32)).compile()
        global_state.client.wait_at_barrier("/".join(group), 1000 * JOIN_SECONDS)
        compiled(np.float32(0)).block_until_ready()


def wait_for_verdict() -> None:
    """After an error that a lost process may have caused, gives the watch the time to find out.

    If one is lost, this process ends with exit code 75; otherwise the call returns.
    """
    if _peers is not None:
        _peers.wait_for_verdict()


def end_process(code: int) -> NoReturn:
    """Ends this process; if it is one of several and failed, the others are told."""
    if _peers is not None:
        _peers.end(code)
    sys.exit(code)


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Gathers a JSON value from every process, in process order; all must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(function: Callable[[], Any]) -> Any:
    """Calls the function in the first process and returns its result in all; all must call it.

    The result is plain JSON.

    Raises:
      ValueError: in all processes, with the message of the first one's ValueError or OSError.
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
    """Yields the result of a compiled program for each input, on the host.

    The next input is prepared while the program runs, but the program is dispatched again only
    after it has finished. Collectives must run in the same order on all processes, and independent
    programs in flight have no order: over gloo, about thirty evaluation steps in flight deadlock.
    """
    running = None
    for x in inputs:
        if running is not None:
            yield jax.device_get(running)
        running = program(x)
    if running is not None:
        yield jax.device_get(running)


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Compares what all processes must have in common; all must call it.

    Raises:
      ValueError: in all processes, naming the odd one, its host and the facts that differ.
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


def _watch_peers(lost_after):
    global _peers
    from jax._src.distributed import global_state as joined  # no public API has client and address

    if joined.num_processes > 1:
        _peers = Peers(
            joined.client,
            address=joined.coordinator_address,
            index=joined.process_id,
            count=joined.num_processes,
            lost_after=lost_after,
        )


def _launched_with_others(environment):
    return any(int(environment.get(name, 1)) > 1 for name in TASK_COUNTS)


def _on_tpu_host():
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _watch(joined: threading.Event, seconds: float) -> None:
    """Prints how many processes have joined; JAX is silent until it aborts."""
    from jax._src.distributed import global_state  # no public API knows this before all have joined

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
            late = time.monotonic() - start > seconds + 5  # let process 0, which counts, go first
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
