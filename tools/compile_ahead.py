"""Compiles a run for devices that you do not have: memory, collectives, upper bound of MFU.

python tools/compile_ahead.py --config=configs/c4_base.py --topology=v5e:16x16 \\
  [--mesh=data=16,fsdp=16] [--config.x=y] [--json=FILE]
python tools/compile_ahead.py --config=configs/c4_base.py --topology=gpu:1x1x8 --gpu=h100.textproto

--topology=2xv5e:16x16 is two slices; what they exchange, over the network, is listed apart.
TPUs need `pip install libtpu`, GPUs jax-cuda12-plugin and jax-cuda12-pjrt. No device is needed.
Exit codes: 0 it fits, 1 it does not, 2 bad input.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.append(str(Path(__file__).resolve().parent.parent))  # config files import each other

from absl import app, flags
from compiled_step import (
    QUICK_OPTIONS,
    WITHOUT_A_TPU,
    CompiledStep,
    DoesNotFitError,
    compile_step,
    run_without_data,
    topology_devices,
)
from ml_collections import config_flags

from perceiver_ar_jax.command_line import exit_code
from perceiver_ar_jax.parallel import MeshConfig

CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:16x16, 2xv5e:16x16, gpu:1x1x8.")
MESH = flags.DEFINE_string("mesh", None, "Such as data=16,fsdp=16; in place of the config's.")
GPU = flags.DEFINE_string("gpu", None, "File that describes the GPU to XLA.")
JSON = flags.DEFINE_string("json", None, "Where to write the figures as JSON.")
QUICK = flags.DEFINE_boolean(
    "quick", False, "Compile for memory and collectives only: faster, no cycles."
)
flags.mark_flags_as_required(["config", "topology"])

LEFT_OUT = (
    "The ceiling is by the compiler's own cycles, never measured on hardware; it leaves out "
    "collectives (as if all were hidden behind computation)."
)
ROOFLINE = (
    "An assumption: the compiler makes no estimate for kernels. Each is taken to run at the peak "
    "of FLOPs or of memory bandwidth, whichever takes longer; real kernels reach a part of it."
)


def main(argv: list[str]) -> int:
    """Prints the figures; returns the exit code."""
    return exit_code("compile_ahead.py", compile_and_print)


def compile_and_print() -> int:
    """0 if the step fits into the memory of the devices, 1 if not."""
    run = run_without_data(CONFIG.value)
    if MESH.value:
        run = dataclasses.replace(run, mesh=mesh_of(MESH.value))
    os.environ |= WITHOUT_A_TPU
    try:
        step = compile_step(
            run,
            topology_devices(TOPOLOGY.value, GPU.value and Path(GPU.value)),
            compiler_options=QUICK_OPTIONS if QUICK.value else None,
        )
    except DoesNotFitError as error:
        print(f"does not fit: {error}")
        return 1
    if QUICK.value:
        step = dataclasses.replace(step, cycles_by_part={})
    print(as_text(step))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(as_json(step), indent=2) + "\n")
    return 0 if step.free_share > 0 else 1


def mesh_of(text: str) -> MeshConfig:
    """The mesh that `data=16,fsdp=16` says; axes that it leaves out have one device.

    Raises:
      ValueError: if it says no mesh.
    """
    try:
        sizes = {axis: int(size) for axis, size in (x.split("=") for x in text.split(","))}
        return MeshConfig(**{"data": 1} | sizes)
    except (ValueError, TypeError):
        raise ValueError(f"--mesh={text} is not of the form data=16,fsdp=16") from None


def as_text(step: CompiledStep) -> str:
    """The figures for a reader."""
    chip = step.chip
    flops = step.model_flops / step.num_devices
    axes = " × ".join(f"{axis}={size}" for axis, size in step.mesh_shape.items() if size > 1)
    lines = [
        f"{step.num_devices} × {chip.name}, {chip.memory_bytes / 2**30:.2f} GiB each; mesh {axes}",
        f"memory per device: {step.memory_bytes / 2**30:.2f} GiB, {step.free_share:.0%} free",
        f"  parameters, moments, batch  {step.argument_bytes / 2**30:8.3f} GiB",
        f"  activations, gradients      {step.temporary_bytes / 2**30:8.3f} GiB",
        f"  program                     {step.program_bytes / 2**30:8.3f} GiB",
        f"model FLOPs per device and step: {flops:.3e} = {flops / chip.peak_flops * 1e3:.1f} ms "
        f"at {chip.peak_flops / 1e12:.0f} TFLOP/s",
        "collectives per step:",
        *(f"  {collective}" for collective in step.collectives),
    ]
    if step.mfu_ceiling is not None:
        to_ms = 1e3 / chip.clock_hz
        lines += [
            f"compiler's cycles: {step.cycles * to_ms:.1f} ms at {chip.clock_hz / 1e9} GHz",
            *(f"  {part:22s}{n * to_ms:8.1f} ms" for part, n in step.cycles_by_part.items()),
            *_kernel_lines(step),
            f"ceiling of model FLOPs utilisation: {step.mfu_ceiling:.2f}",
            LEFT_OUT,
        ]
    return "\n".join(lines)


def _kernel_lines(step):
    if not step.kernels:
        return []
    return [
        f"kernels, by roofline: {step.kernel_seconds * 1e3:.1f} ms more",
        *(
            f"  {kernel.name:22s}{kernel.seconds(step.chip) * 1e3:8.1f} ms, {kernel.executions} "
            f"times, {kernel.flops:.2e} FLOPs, {kernel.bytes_accessed / 2**30:.2f} GiB in all"
            for kernel in step.kernels
        ),
        ROOFLINE,
    ]


def as_json(step: CompiledStep) -> dict:
    """The same for a program."""
    derived = ("memory_bytes", "free_share", "cycles", "kernel_seconds", "mfu_ceiling")
    return dataclasses.asdict(step) | {name: getattr(step, name) for name in derived}


if __name__ == "__main__":
    app.run(main)
