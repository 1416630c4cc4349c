"""Counts the instructions of a run's attention kernels on TPUs that you do not have.

python tools/compile_kernels.py --config=configs/c4_base.py --topology=v5e:16x16 \\
  [--config.x=y] [--json=FILE]

The compiler makes no estimate of a kernel's time, but it can print the bundles of instructions, of
which a core starts one per cycle. The prefix is taken to be whole: neither streamed (prefix_chunk)
nor spread over a mesh axis. Needs `pip install libtpu`, and no device. Exit code 2: bad input.
"""

import dataclasses
import functools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.append(str(Path(__file__).resolve().parent.parent))  # config files import each other

import jax
import jax.numpy as jnp
from absl import app, flags
from compiled_step import WITHOUT_A_TPU, run_without_data, topology_devices
from ml_collections import config_flags
from xla_dump import Kernel

from perceiver_ar_jax.command_line import exit_code
from perceiver_ar_jax.model.attention import Visibility, pallas
from perceiver_ar_jax.parallel import MeshConfig, check_batch_size, make_mesh, replicated, use_mesh
from perceiver_ar_jax.parallel.chips import Chip, chip_of
from perceiver_ar_jax.run_config import RunConfig

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:16x16.")
JSON = flags.DEFINE_string("json", None, "Where to write the figures as JSON.")
flags.mark_flags_as_required(["config", "topology"])

EXTRA_TURNS = 2  # of a kernel's loop: before the first blocks are there, and after the last
LEFT_OUT = (
    "Bundles: one per cycle, every branch taken, and nothing waits for memory. The roofline: the "
    "peak of FLOPs or of memory bandwidth, whichever takes longer. Never measured on hardware."
)


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel over a whole step, on one core of a device."""

    kernel: Kernel  # what it says of itself, on the whole device
    turns: int  # of one execution's grid
    bundles_outside: int  # of the loop over the grid
    bundles_per_turn: int
    matmul_share: float  # of the cycles of the matmul units that are in use during a turn

    def seconds(self, chip: Chip) -> float:
        """By bundles, of all executions together."""
        cycles = self.bundles_outside + (self.turns + EXTRA_TURNS) * self.bundles_per_turn
        return self.kernel.executions * cycles / chip.clock_hz


def main(argv: list[str]) -> int:
    """Prints the figures; returns the exit code."""
    return exit_code("compile_kernels.py", compile_and_print)


def compile_and_print() -> int:
    """A line for each kernel."""
    run = run_without_data(CONFIG.value)
    if TOPOLOGY.value.startswith("gpu"):
        raise ValueError(f"--topology={TOPOLOGY.value}: the kernels are for TPUs")
    os.environ |= WITHOUT_A_TPU
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads this once, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final"
        )
        devices = topology_devices(TOPOLOGY.value)
        chip = chip_of(devices[0].device_kind)
        if chip is None or chip.clock_hz is None:
            raise ValueError(f"nothing is known of the clock of {devices[0].device_kind}")
        kernels = compile_kernels(run, devices, Path(folder))
    print(as_text(kernels, chip))
    if JSON.value:
        figures = [dataclasses.asdict(x) | {"seconds": x.seconds(chip)} for x in kernels]
        Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def compile_kernels(run: RunConfig, devices: list, folder: Path) -> list[CompiledKernel]:
    """Both kernels of each kind of attention in a training step, compiled for one device.

    Args:
      run: how many rows and heads a device has, and how often a kernel runs in a step.
      devices: all TPUs of the run.
      folder: where libtpu was told to dump to.

    Raises:
      ValueError: if mesh, batch and widths do not fit each other.
    """
    model = run.model
    mesh = make_mesh(run.mesh, devices, num_channels=model.num_channels)
    check_batch_size(run.batch_size, mesh, run.microbatches)
    rows = run.batch_size // run.microbatches // (mesh.shape["data"] * mesh.shape["fsdp"])
    heads, latents = model.num_heads // mesh.shape["tensor"], model.max_latents
    one_device = make_mesh(MeshConfig(data=1), devices[:1])
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(one_device))

    def compile_pair(of, num_keys, causal, executions):
        q_BLNH = shape((rows, latents, heads, model.head_dim), model.dtype)
        k_BKNH = shape((rows, num_keys, heads, model.head_dim), model.dtype)
        statistics_BNL = shape((rows, heads, latents), jnp.float32)
        inputs = q_BLNH, k_BKNH, k_BKNH, Visibility(shape((rows, num_keys), bool), causal=causal)
        gradients = q_BLNH, None if causal else statistics_BNL
        compiled = functools.partial(_compile, executions, devices[0].num_cores, folder)
        yield compiled(f"forward, {of}", pallas.forward, *inputs)
        outputs = q_BLNH, statistics_BNL
        yield compiled(f"backward, {of}", pallas.backward, *inputs, *outputs, *gradients)

    with use_mesh(one_device):
        layers = run.microbatches * (1 + model.num_self_attention_layers)
        kernels = [*compile_pair("latents", latents, True, layers)]
        if run.prefix_len:
            kept = run.prefix_len - int(run.prefix_len * model.cross_attention_dropout)
            kernels += compile_pair("prefix", kept, False, run.microbatches)
    return kernels


def _compile(executions, num_cores, folder, name, function: Callable, *inputs):
    for file in folder.iterdir():
        file.unlink()
    traced = jax.jit(function).trace(*inputs)
    traced.lower().compile()
    call = next(x.params for x in traced.jaxpr.eqns if x.primitive.name == "pallas_call")
    cost = call["cost_estimate"]
    kernel = Kernel(name, executions, executions * cost.flops, executions * cost.bytes_accessed)
    turns = math.prod(call["grid_mapping"].grid) // num_cores
    return CompiledKernel(kernel, turns, *_bundles(folder))


def _bundles(folder):
    """(outside the loop, in it, share of the matmul units in it) of the kernel in a dump."""
    (listing,) = folder.glob("*attention*[0-9]-final_bundles.txt")
    (usage,) = folder.glob("*attention*-final_hlo-static-per-bundle-utilization.txt")
    # Such as `0x1f LB: > { … }`, with one `>` for each loop around it.
    bundles = re.finditer(r"^ *0\w* +(?:\w\w)? *: *(>*)", listing.read_text(), re.MULTILINE)
    _, units, capacity, _, *rows = usage.read_text().splitlines()
    matmul = units.split(", ").index("MATMUL")
    in_use = [int(row.split()[matmul]) for row in rows]
    in_loop = [used for used, bundle in zip(in_use, bundles, strict=True) if bundle[1]]
    # A single turn is not a loop.
    share = sum(in_loop) / max(1, len(in_loop)) / int(capacity.split()[matmul])
    return len(in_use) - len(in_loop), len(in_loop), share


def as_text(kernels: list[CompiledKernel], chip: Chip) -> str:
    """The figures for a reader; times in the table are those of one execution."""
    lines = [
        f"{'one ' + chip.name:20}{'executions':>11}{'turns':>7}{'bundles':>9}{'matmul units':>14}"
        f"{'by bundles':>14}{'roofline':>12}"
    ]
    for x in kernels:
        times = x.kernel.executions
        to_us = 1e6 / times
        lines.append(
            f"{x.kernel.name:20}{times:11}{x.turns:7}{x.bundles_per_turn:9,}{x.matmul_share:14.0%}"
            f"{x.seconds(chip) * to_us:11.1f} µs{x.kernel.seconds(chip) * to_us:9.1f} µs"
        )
    by_bundles = sum(x.seconds(chip) for x in kernels) * 1e3
    by_roofline = sum(x.kernel.seconds(chip) for x in kernels) * 1e3
    lines.append(f"a step: {by_bundles:.1f} ms by bundles, {by_roofline:.1f} ms by roofline")
    return "\n".join([*lines, LEFT_OUT])


if __name__ == "__main__":
    app.run(main)
