"""Runs short forms of the benchmarks and writes benchmarks/results/NAME.json, to be committed.

    make bench                                        # all of them, 15 minutes on one core
    python benchmarks/run_all.py --names tokenizing --data shared/data

Each benchmark is run --repeats times, all of them in turn, on one core. compare.py compares two
versions of the files and takes its noise from the values of these runs. A file has the command,
processor, jax version, load, date, commit ("+" if files differed from it), and the values of each
figure.

Needs what `make test` installs, perceiver-io included.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from compare import RESULTS, ROOT


@dataclasses.dataclass(frozen=True)
class ShortRun:
    """A command, and which numbers of its JSON are kept.

    `figures` are pairs of a pattern and a kind of compare.KINDS. A number's name is its path in the
    JSON, with slashes.
    """

    command: str  # {data}: the folder of --data
    figures: tuple[tuple[str, str], ...]


TRAINING = (
    ("ratio/perceiver-io float32/ours float32", "speed ratio"),
    ("ratio/perceiver-io autocast/ours bfloat16", "speed ratio"),
    ("of_peak/ours *", "speed ratio"),
    ("temporaries_mib/*", "memory"),
    ("compile_seconds/*", "seconds"),
)
WEIGHTS = (
    ("ratio/float32 *", "speed ratio"),
    ("ratio/int8 *", "speed ratio"),
    ("tokens_per_sec/*", "rate"),
)
LOOKUP = (("ratio/* lookup *", "speed ratio"), ("tokens_per_sec/* lookup *", "rate"))
SHORT_RUNS = {
    "training_tiny": ShortRun("training.py --models tiny --rounds 3", TRAINING),
    "training_bytes_small": ShortRun(
        "training.py --models bytes_small --layers 2 --batch 1 --rounds 3", TRAINING
    ),
    "evaluation": ShortRun(
        "evaluation.py --vocab 4096 --batch 2 --rounds 5",
        (("ratio", "cost ratio"), ("seconds_per_window/*", "seconds")),
    ),
    "decoding_reference": ShortRun(
        "decoding.py --model tiny --reference --prompt 256 --new 65",
        (("ratio/raw slide", "speed ratio"), ("tokens_per_sec/raw slide", "rate")),
    ),
    "decoding_one_row": ShortRun(
        "decoding.py --weights raw float32 int8 --prompt 64 --new 33", WEIGHTS
    ),
    "decoding_four_rows": ShortRun(
        "decoding.py --weights raw float32 int8 --batch 4 --prompt 64 --new 33", WEIGHTS
    ),
    "prompt_lookup": ShortRun(
        "prompt_lookup.py --model tiny --text {data}/wikitext2/wiki.valid.raw"
        " --prompt 768 --new 129",
        (("tokens_per_pass/6", "speed ratio"), *LOOKUP),
    ),
    "prompt_lookup_quotation": ShortRun(
        "prompt_lookup.py --model tiny --quote --text {data}/books/9198-complete-angler.txt"
        " --prompt 768 --new 129",
        (("tokens_per_pass/6", "speed ratio"), *LOOKUP),
    ),
    "tokenizing": ShortRun(
        "tokenizing.py {data}/c4/*.jsonl --tokenizer {data}/xlnet/spiece.model",
        (("ratio/*", "speed ratio"), ("ours/first", "rate"), ("ours/later", "rate")),
    ),
    "data": ShortRun(
        "data.py {data}/c4/*.jsonl --tokenizer {data}/xlnet/spiece.model"
        " --workers 1 --seconds 3 --rounds 1",
        (("ratio_tokens_per_cpu_second", "speed ratio"), ("ours/tokens_per_cpu_second", "rate")),
    ),
    "checkpoints": ShortRun(
        "checkpoints.py --rounds 2", (("ratio/*", "cost ratio"), ("seconds/*", "seconds"))
    ),
    "conversion": ShortRun(
        "conversion.py --model bytes_small --verify none",
        (("*/gb_above_imports", "memory"), ("*/*_torch/cpu_seconds", "seconds")),
    ),
    "long_prefix": ShortRun(
        "long_prefix.py --models streamed --lengths 16384",
        (("entries/*/peak_mib", "memory"), ("entries/*/seconds", "seconds")),
    ),
}


def main() -> int:
    """Runs and writes; returns the exit code, 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", choices=SHORT_RUNS, default=list(SHORT_RUNS))
    parser.add_argument("--repeats", type=int, default=3, help="at least 2, to know the noise")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats={args.repeats}: noise is known from 2 on")
    if not (args.data / "xlnet" / "spiece.model").is_file():
        parser.error(f"--data={args.data} has no xlnet/spiece.model: `make test-data` makes it")
    if args.core not in (cores := os.sched_getaffinity(0)):
        parser.error(f"--core={args.core} is not one of {sorted(cores)}")
    os.sched_setaffinity(0, {args.core})
    results, commit = {name: [] for name in args.names}, current_commit()
    for repeat in range(args.repeats):
        for name, outputs in results.items():
            begin = time.monotonic()
            outputs.append(output_of(command_of(name, args.data.resolve())))
            seconds = time.monotonic() - begin
            state = f"{seconds:.0f} s" if outputs[-1] else "failed"
            print(f"{repeat + 1}/{args.repeats} {name}: {state}", flush=True)
            if all(outputs) and repeat > 0:  # what an interrupted run has measured is kept
                path = ROOT / RESULTS / f"{name}.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(summary(name, outputs, commit), indent=1) + "\n")
    return 0 if all(map(all, results.values())) else 1


def command_of(name: str, data: Path) -> list[str]:
    """Script and arguments; patterns of files are left for the script."""
    script, *arguments = SHORT_RUNS[name].command.split()
    return [str(ROOT / "benchmarks" / script), *(x.format(data=data) for x in arguments)]


def output_of(command: list[str]) -> dict | None:
    """The JSON that a benchmark prints; None, with its last words shown, if it failed."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(done.stdout)


def summary(name: str, outputs: list[dict], commit: str) -> dict:
    """What is written of all runs of a benchmark."""
    run, numbers = SHORT_RUNS[name], [dict(numbers_of(output)) for output in outputs]
    first = outputs[0]
    result = {
        "command": f"python benchmarks/{run.command}",
        **{key: first[key] for key in ("processor", "jax", "date")},
        "load": max(output["load"] for output in outputs),
        "commit": commit,
    }
    if "matmul_gflops" in first:
        result["matmul_gflops"] = [output["matmul_gflops"] for output in outputs]
    figures = {}
    for pattern, kind in run.figures:
        for found in fnmatch.filter(numbers[0], pattern):
            values = [number[found] for number in numbers]
            figures[found] = {"kind": kind, "values": values}
    return result | {"figures": figures}


def numbers_of(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in JSON, with their paths."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from numbers_of(inner, f"{path}/{key}" if path else str(key))
    elif isinstance(value, int | float):
        yield path, value


def current_commit() -> str:
    """Short, with + if files differ from it; empty outside git."""
    git = lambda *arguments: subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
