"""Reads XLA's dump of a compiled program: how often each instruction runs, cycles, collectives."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

from perceiver_ar_jax.parallel.chips import Chip

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}

# Parts of the step by what an instruction's op_name contains; the first that matches counts.
PARTS = (
    ("mlp", r"/mlp/"),
    ("attention", r"attention[/.]|/[qkvo]_proj|_norm|/norm/|PerceiverAR\._first_layer"),
    ("embedding", r"embedding"),
    ("layers, other", r"PerceiverAR"),
    ("head and loss", r"cross_entropy|/jvp\(\)/|/while/body"),
)
LAST_PART = "optimizer and other"

_INSTRUCTION = re.compile(
    r"^  (?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\("
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices, over a whole step."""

    kind: str
    dtype: str
    executions: int
    total_bytes: int  # of the results on one device

    def __str__(self):
        size = f"{self.total_bytes / 2**20:,.1f} MiB"
        return f"{self.kind} {self.dtype}: {self.executions} times, {size} in all"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kind of hand-written kernel over a whole step: what it says of itself, on one device."""

    name: str
    executions: int
    flops: int  # of all executions together
    bytes_accessed: int

    def seconds(self, chip: Chip) -> float:
        """The roofline, a lower bound: the compiler makes no estimate of a kernel's time."""
        return max(self.flops / chip.peak_flops, self.bytes_accessed / chip.memory_bandwidth)


class Program:
    """An HLO module as text, with the number of times each computation runs in one step."""

    def __init__(self, text: str):
        self._computations = {}
        self._entry = None
        name = None
        for line in text.splitlines():
            if line and not line.startswith((" ", "}")) and line.endswith("{"):
                name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
                self._computations[name] = []
                if line.startswith("ENTRY"):
                    self._entry = name
            elif name and (found := _INSTRUCTION.match(line)):
                self._computations[name].append((found["opcode"], found["shape"], line))

    @classmethod
    def from_dump(cls, directory: Path) -> "Program":
        """The largest module in a directory that XLA was told to dump to."""
        files = list(directory.glob("*.after_codegen.txt"))
        files = files or list(directory.glob("*after_optimizations.txt"))
        return cls(max(files, key=lambda file: file.stat().st_size).read_text())

    def instructions(self) -> Iterator[tuple[int, str, str, str]]:
        """(executions, opcode, shape, line) of everything that runs, loops multiplied out."""
        yield from self._walk(self._entry, 1, set())

    def cycles_by_part(self) -> dict[str, int]:
        """The compiler's estimate for one step, by part, most first; collectives are not in it."""
        cycles = collections.Counter()
        for executions, _, _, line in self.instructions():
            cycles[_part_of(line)] += executions * _estimated_cycles(line)
        return {part: n for part, n in cycles.most_common() if n}

    def cycles_of_a_turn(self) -> int:
        """The estimate for one turn of the loops that the program runs, without what is around."""
        bodies = [
            _called(line, "body")
            for opcode, _, line in self._computations[self._entry]
            if opcode == "while"
        ]
        return sum(
            executions * _estimated_cycles(line)
            for body in bodies
            for executions, _, _, line in self._walk(body, 1, set())
        )

    def collectives(self) -> list[Collective]:
        """Exchanges of one step by kind and dtype, most bytes first."""
        times, sizes = collections.Counter(), collections.Counter()
        for executions, opcode, shape, line in self.instructions():
            kind = opcode.removesuffix("-start")
            arrays = list(_arrays(shape))
            if opcode == "recv" and (found := re.search(r'megascale_transfer_type="(\w+)"', line)):
                kind = found[1].lower().replace("_", "-") + " between slices"
                arrays = arrays[:1]  # then comes what the runtime needs
            elif kind not in COLLECTIVES:
                continue
            times.update({(kind, dtype): executions for dtype in {dtype for dtype, _ in arrays}})
            for dtype, size in arrays:
                sizes[kind, dtype] += size * executions
        found = [Collective(*key, times[key], sizes[key]) for key in times]
        return sorted(found, key=lambda collective: -collective.total_bytes)

    def kernels(self) -> list[Kernel]:
        """Pallas kernels of one step by name, as their `pl.CostEstimate` has them."""
        totals = collections.defaultdict(collections.Counter)
        for executions, _, _, line in self.instructions():
            if "tpu_custom_call" not in line:
                continue
            name = re.search(r"([\w\-]+)/pallas_call", line)
            total = totals[name[1] if name else "kernel"]
            total["executions"] += executions
            for cost in ("flops", "bytes_accessed"):
                said = re.search(rf'"{cost}":"(\d+)"', line)
                total[cost] += executions * int(said[1] if said else 0)
        return [
            Kernel(name, total["executions"], total["flops"], total["bytes_accessed"])
            for name, total in totals.items()
        ]

    def _walk(self, name, executions, channels):
        for opcode, shape, line in self._computations[name]:
            yield executions, opcode, shape, line
            if opcode == "while":
                times = executions * self._trip_count(line)
                yield from self._walk(_called(line, "body"), times, channels)
            elif opcode == "call":
                yield from self._walk(_called(line, "to_apply"), executions, channels)
            elif opcode in ("fusion", "async-start"):
                yield from self._exchanges_in(line, executions, shape, channels)

    def _exchanges_in(self, line, executions, shape, channels):
        """What a fusion exchanges, but for the channels met before; its cycles stand at itself."""
        fusion = _called(line, "calls")
        if fusion.startswith("all-reduce-scatter"):  # so TPUs write a reduce-scatter
            yield executions, "reduce-scatter", shape, line
            return
        for opcode, shape, line in self._computations[fusion]:
            if opcode in ("fusion", "async-start"):
                yield from self._exchanges_in(line, executions, shape, channels)
            elif opcode.removesuffix("-start") in COLLECTIVES:
                # A collective next to several matmuls is in the fusion of each of them.
                channel = re.search(r"channel_id=\d+", line)
                if channel is None or channel[0] not in channels:
                    yield executions, opcode, shape, line
                channels.add(channel and channel[0])

    def _trip_count(self, line):
        """How often a scan's loop runs: its condition compares a counter with a constant."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if known:
            return int(known[1])
        condition = self._computations[_called(line, "condition")]
        constants = [re.search(r" constant\((\d+)\)", line) for _, _, line in condition]
        return max((int(found[1]) for found in constants if found), default=1)


def _estimated_cycles(line):
    found = re.search(r'"estimated_cycles":"(\d+)"', line)
    return int(found[1]) if found else 0


def _called(line, attribute):
    return re.search(rf"\b{attribute}=%?([\w.\-]+)", line)[1]


def _arrays(shape):
    for dtype, dimensions in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shape):
        sizes = map(int, filter(None, dimensions.split(",")))
        yield dtype, BYTES.get(dtype, 4) * math.prod(sizes)


def _part_of(line):
    name = re.search(r'op_name="([^"]*)"', line)
    name = name[1] if name else ""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), LAST_PART)
