"""Says what became slower than the last committed figures by more than its noise.

    make bench && make bench-compare                  # the working tree with HEAD
    python benchmarks/compare.py --ref v1.0 [--names training_tiny tokenizing]

Compares medians of figures in benchmarks/results/*.json, which run_all.py writes, one line for each
that is slower (or larger) or faster by more than its noise:

    noise = range of the old values + range of the new ones, at least the `least` of its kind,

where a range is largest less smallest of all runs, relative to their median. So a figure whose
runs differ must change by more than they do, and one whose runs happen to agree by more than a
tenth.

Ratios within a run and memory are compared whatever the machine. Seconds and rates are compared
only where processor and jax version are the same, relative to the speed of a large matmul in the
same run where the benchmark measures one. Other work on the machine changes speeds by more than
runs differ, ratios included: where the loads differ by more than MAX_LOAD_CHANGE, only memory is
compared.

Exit codes: 0 nothing is slower, 1 something is, 2 bad input.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks", "results")
SAME_MACHINE = ("processor", "jax")
MAX_LOAD_CHANGE = 1.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """How figures of one kind are compared."""

    higher_is_better: bool
    on_any_machine: bool
    least: float  # a smaller change is noise, as a fraction


KINDS = {
    "speed ratio": Kind(higher_is_better=True, on_any_machine=True, least=0.1),
    "cost ratio": Kind(higher_is_better=False, on_any_machine=True, least=0.1),
    "memory": Kind(higher_is_better=False, on_any_machine=True, least=0.02),
    "seconds": Kind(higher_is_better=False, on_any_machine=False, least=0.1),
    "rate": Kind(higher_is_better=True, on_any_machine=False, least=0.1),
}


def main() -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ref", default="HEAD", help="the commit to compare with (default: HEAD)")
    parser.add_argument("--names", nargs="+", help="of benchmarks (default: all with results)")
    args = parser.parse_args()
    names = args.names or sorted(path.stem for path in (ROOT / RESULTS).glob("*.json"))
    compared = slower = 0
    for name in names:
        try:
            old = committed(args.ref, name)
            new = json.loads((ROOT / RESULTS / f"{name}.json").read_text())
        except FileNotFoundError:
            print(f"compare.py: no {RESULTS}/{name}.json: `make bench` writes it", file=sys.stderr)
            return 2
        except (LookupError, ValueError) as error:
            print(f"compare.py: {error}", file=sys.stderr)
            return 2
        if old is None or old == new:
            print(f"{name}: {'not in' if old is None else 'the same measurement as in'} {args.ref}")
            continue
        if old["command"] != new["command"]:
            print(f"{name}: not compared, as its command was {old['command']}")
            continue
        for figure, text, is_slower in differences(old, new):
            print(f"{name}: {figure}: {text}")
            slower += is_slower
        compared += len(comparable_figures(old, new))
    print(f"{slower or 'nothing'} slower, of {compared} figures compared")
    return 1 if slower else 0


def committed(ref: str, name: str) -> dict | None:
    """The benchmark's results in a commit; None where it has none.

    Raises:
      LookupError: there is no such commit.
    """
    git = lambda *arguments: subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").returncode:
        raise LookupError(f"--ref={ref} is not a commit here")
    shown = git("show", f"{ref}:{RESULTS.as_posix()}/{name}.json")
    return None if shown.returncode else json.loads(shown.stdout)


def differences(old: dict, new: dict) -> Iterator[tuple[str, str, bool]]:
    """Name, description and whether it is slower, of each figure that changed beyond its noise."""
    for name in old["figures"].keys() - new["figures"].keys():
        yield name, f"no longer measured, was {median(old, name):.4g}", False
    if changed := [f"{old[x]} → {new[x]}" for x in SAME_MACHINE if old[x] != new[x]]:
        yield "seconds and rates", f"not compared, as {', '.join(changed)}", False
    if not is_same_load(old, new):
        yield "speeds", f"not compared, as the load was {old['load']} and is {new['load']}", False
    for name in comparable_figures(old, new):
        kind = KINDS[new["figures"][name]["kind"]]
        before, after = (relative_to_matmul(result, name, kind) for result in (old, new))
        noise = max(kind.least, relative_range(before) + relative_range(after))
        factor = statistics.median(after) / statistics.median(before)
        worse = 1 / factor if kind.higher_is_better else factor
        if worse > 1 + noise or 1 / worse > 1 + noise:
            words = ("larger", "smaller") if kind is KINDS["memory"] else ("slower", "faster")
            text = f"{words[worse < 1]}: {median(old, name):.4g} → {median(new, name):.4g}"
            yield name, f"{text} ({factor - 1:+.0%}, noise {noise:.0%})", worse > 1


def comparable_figures(old: dict, new: dict) -> list[str]:
    """Names that both have, as far as machine, jax version and load allow."""
    is_same_machine = all(old[name] == new[name] for name in SAME_MACHINE)
    return [
        name
        for name, figure in new["figures"].items()
        if name in old["figures"]
        and (is_same_machine or KINDS[figure["kind"]].on_any_machine)
        and (is_same_load(old, new) or figure["kind"] == "memory")
    ]


def is_same_load(old: dict, new: dict) -> bool:
    """Whether other work slowed both about as much."""
    return abs(old["load"] - new["load"]) <= MAX_LOAD_CHANGE


def median(result: dict, name: str) -> float:
    """As measured."""
    return statistics.median(result["figures"][name]["values"])


def relative_to_matmul(result: dict, name: str, kind: Kind) -> list[float]:
    """The values of all runs; seconds and rates are divided by those of a matmul, if measured."""
    values, matmuls = result["figures"][name]["values"], result.get("matmul_gflops")
    if kind.on_any_machine or not matmuls:
        return values
    per_matmul = (lambda x, y: x / y) if kind.higher_is_better else (lambda x, y: x * y)
    return list(map(per_matmul, values, matmuls))


def relative_range(values: list[float]) -> float:
    """Largest less smallest, relative to the median."""
    return (max(values) - min(values)) / statistics.median(values)


if __name__ == "__main__":
    sys.exit(main())
