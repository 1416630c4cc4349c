"""Kills a training run again and again and compares it bit for bit with an uninterrupted one.

python tools/torture.py --workdir=runs/torture --kills=5 [--processes=2 --devices=2] \\
  -- --config=configs/tiny.py --config.data.source=README.md

The flags after `--` go to train.py. The run is done twice: straight through, and with SIGKILL or
SIGTERM at random moments, restarted each time. Then the losses and gradient norms of every step,
including steps that were done twice, and the checksums of all parameters and optimizer state are
compared. Exit codes: 0 same bits, 1 different bits or a stuck run, 2 bad input.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVICES = "--xla_force_host_platform_device_count"


class StuckError(Exception):
    """A run wrote nothing for so long that it will never end; says where its output is."""


def main() -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="Deleted first.")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="Joined by jax.distributed.")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process.")
    parser.add_argument(
        "--lose_one",
        action="store_true",
        help="SIGKILL to one of several processes, never SIGTERM; the others must exit with 75.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the kill times.")
    parser.add_argument(
        "--stuck_after",
        type=float,
        default=600,
        metavar="SECONDS",
        help="A run that writes nothing for so long is ended and reported (default: 600).",
    )
    parser.add_argument("command", nargs="+", help="-- and the flags of train.py")
    options = parser.parse_args()
    try:
        return torture(options)
    except StuckError as error:
        print(f"torture.py: {error}", file=sys.stderr)
        return 1


def torture(options: argparse.Namespace) -> int:
    """Runs both, compares, prints the result as JSON; returns the exit code."""
    shutil.rmtree(options.workdir, ignore_errors=True)
    cache = f"--config.compilation_cache={options.workdir.absolute() / 'compiled'}"
    run = Run([*options.command, "--config.log_every=1", cache], options)

    straight, killed = options.workdir / "straight", options.workdir / "killed"
    if (code := run.to_end(straight)) != 0:
        print(f"the straight run ended with exit code {code}", file=sys.stderr)
        return 2
    total = max(steps_of(straight), default=0)
    rng = random.Random(options.seed)
    for kill in range(options.kills):
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        number = signal.SIGKILL if options.lose_one else number
        # Spread over the run: kill number k comes when about k / kills of it are done.
        at = (kill + rng.random()) * total / (options.kills + 1)
        jitter, victim = rng.uniform(0, 0.3), rng.randrange(options.processes)
        step = run.until(killed, at, number, jitter=jitter, victim=victim)
        print(f"kill {kill + 1}: {number.name} at step {step}", flush=True)
    if (code := run.to_end(killed)) != 0:
        print(f"the killed run ended with exit code {code}", file=sys.stderr)
        return 1
    problems = differences(straight, killed)
    for line in problems[:10]:
        print(line, file=sys.stderr)
    print(
        json.dumps(
            {
                "kills": options.kills,
                "steps": total,
                "steps_done_again": lost_steps(killed),
                "same_bits": not problems,
            }
        )
    )
    return 1 if problems else 0


class Run:
    """Starts train.py in one process or several, watches it and sends it signals."""

    def __init__(self, flags: list[str], options: argparse.Namespace):
        self._flags, self._count = flags, options.processes
        self._stuck_after, self._lose_one = options.stuck_after, options.lose_one
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}={options.devices}",
        }

    def to_end(self, workdir: Path) -> int:
        """Runs undisturbed; returns the exit code, the highest of several."""
        processes = self._start(workdir)
        self._watch(processes, workdir, lambda: False)
        return max(process.returncode for process in processes)

    def until(
        self, workdir: Path, step: float, number: signal.Signals, *, jitter: float, victim: int
    ) -> int:
        """Runs to a step and a little on, then sends the signal; returns the step it was at."""
        processes = self._start(workdir)
        self._watch(processes, workdir, lambda: max(steps_of(workdir), default=-1) >= step)
        time.sleep(jitter)
        processes[victim].send_signal(number)  # to one of several; the others follow
        if number == signal.SIGKILL and not self._lose_one:
            for process in processes:
                process.kill()
        self._watch(processes, workdir, lambda: False)
        codes = {process.returncode for process in processes}
        expected = {-signal.SIGKILL} if number == signal.SIGKILL else {143, -signal.SIGTERM}
        if self._lose_one:
            expected.add(os.EX_TEMPFAIL)
        if not codes <= expected | {0}:
            raise RuntimeError(f"{number.name} at step {step:.0f} gave exit codes {sorted(codes)}")
        return max(steps_of(workdir), default=0)

    def _watch(self, processes: list, workdir: Path, is_done: Callable[[], bool]) -> None:
        """Returns when the condition holds or all processes have ended.

        Raises:
          StuckError: the run wrote nothing for too long; its processes are ended.
        """
        size, since = -1, time.monotonic()
        while not is_done() and any(process.poll() is None for process in processes):
            if size != (size := bytes_written(workdir)):
                since = time.monotonic()
            if time.monotonic() - since > self._stuck_after:
                for process in processes:
                    process.kill()
                    process.wait()
                raise StuckError(
                    f"the run wrote nothing for {self._stuck_after:.0f} s after step "
                    f"{max(steps_of(workdir), default=0)}; see {workdir / 'output.txt'}"
                )
            time.sleep(0.01)

    def _start(self, workdir: Path) -> list[subprocess.Popen]:
        workdir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *self._flags]
        environments = [self._environment]
        if self._count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self._count)}
            environments = [
                self._environment | joined | {"JAX_PROCESS_ID": str(index)}
                for index in range(self._count)
            ]
        with (workdir / "output.txt").open("a") as output:
            return [
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
                for environment in environments
            ]


def bytes_written(workdir: Path) -> int:
    """The size of what a run prints and of its metrics."""
    files = (workdir / name for name in ("output.txt", "metrics.jsonl"))
    return sum(file.stat().st_size for file in files if file.is_file())


def steps_of(workdir: Path) -> list[int]:
    """Steps whose loss is in metrics.jsonl."""
    return [line["step"] for line in lines_of(workdir) if "train/loss" in line]


def lines_of(workdir: Path) -> list[dict]:
    """What the run has written; its last line may be incomplete."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def lost_steps(workdir: Path) -> int:
    """Steps that were done more than once."""
    steps = steps_of(workdir)
    return len(steps) - len(set(steps))


def differences(straight: Path, killed: Path) -> list[str]:
    """Every number of a step and every leaf of the last checkpoint that differs."""
    names = ("train/loss", "optim/grad_norm", "eval/loss")
    expected = {
        (line["step"], name): line[name]
        for line in lines_of(straight)
        for name in names
        if name in line
    }
    actual = [
        ((line["step"], name), line[name])
        for line in lines_of(killed)
        for name in names
        if name in line
    ]
    problems = [
        f"{name} at step {step}: {value!r}, straight {expected.get((step, name))!r}"
        for (step, name), value in actual
        if value != expected.get((step, name))
    ]
    missing = expected.keys() - dict(actual).keys()
    problems += [f"{name} at step {step} is missing" for step, name in sorted(missing)]
    if last_contents(straight) != last_contents(killed):
        problems.append("the last checkpoints differ")
    return problems


def last_contents(workdir: Path) -> dict:
    """Shapes and checksums of parameters and optimizer state."""
    folder = max((workdir / "checkpoints").iterdir(), key=lambda step: int(step.name))
    (file,) = (file for file in (folder / "contents").iterdir() if file.name == "metadata")
    contents = json.loads(file.read_text())
    return {name: contents[name] for name in ("params", "train")} | {"step": folder.name}


if __name__ == "__main__":
    sys.exit(main())
