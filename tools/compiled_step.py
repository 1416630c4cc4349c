"""Compiles a run's training step for devices that are not there; what it takes, as figures."""

import dataclasses
import re
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict
from xla_dump import Collective, Kernel, Program

from perceiver_ar_jax.lowering import lower_train_step
from perceiver_ar_jax.model.flops import training_flops
from perceiver_ar_jax.parallel import check_batch_size, make_mesh
from perceiver_ar_jax.parallel.chips import Chip, chip_of
from perceiver_ar_jax.run_config import RunConfig

# What libtpu must find in the environment on a machine that has no TPU.
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor a device to lock
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any one: libtpu complains without it
    "TPU_WORKER_HOSTNAMES": "localhost",
}


# XLA's effort level O0 by its number, which every supported jax takes. Its cycles mean nothing.
QUICK_OPTIONS = {"optimization_level": 9}


class DoesNotFitError(Exception):
    """The compiler found no room for the program; the message is the compiler's arithmetic."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What one training step takes on one device."""

    chip: Chip
    num_devices: int
    mesh_shape: dict[str, int]
    model_flops: int  # of all devices together; what is computed a second time is not counted
    argument_bytes: int  # parameters, moments, averages and batch; they stay
    temporary_bytes: int  # activations, gradients, gathered weights
    program_bytes: int
    cycles_by_part: dict[str, int]
    collectives: list[Collective]
    kernels: list[Kernel]

    @property
    def memory_bytes(self) -> int:
        """The state is updated in place, so results take no memory of their own."""
        return self.argument_bytes + self.temporary_bytes + self.program_bytes

    @property
    def free_share(self) -> float:
        """Of the device's memory."""
        return 1 - self.memory_bytes / self.chip.memory_bytes

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it makes none."""
        return sum(self.cycles_by_part.values())

    @property
    def kernel_seconds(self) -> float:
        """Of all Pallas kernels, if each ran at the limit of the chip's FLOPs or memory."""
        return sum(kernel.seconds(self.chip) for kernel in self.kernels)

    @property
    def mfu_ceiling(self) -> float | None:
        """Model FLOPs utilisation if collectives took no time, and kernels `kernel_seconds`."""
        if not self.cycles or not self.chip.clock_hz:
            return None
        seconds = self.cycles / self.chip.clock_hz + self.kernel_seconds
        return self.model_flops / self.num_devices / self.chip.peak_flops / seconds


def run_without_data(config: ConfigDict) -> RunConfig:
    """The run that a config describes, for tools that read no data: it need not name any."""
    if not config.data.source and not config.data.get("text"):
        config.data.source = "none"
    return RunConfig.from_config(config)


def topology_devices(topology: str, gpu_description: Path | None = None) -> list:
    """Devices of `v5e:16x16` and the like, or of `gpu:1x1x8` (in the order in which XLA counts).

    `2xv5e:16x16` is two slices.

    Raises:
      ValueError: if there is no such topology, or the package that knows it is not installed.
    """
    slices, name = re.fullmatch(r"(?:(\d+)x(?=\w+:))?(.*)", topology).groups()
    kind, _, shape = name.partition(":")
    options = {"platform": "tpu", "topology_name": name}
    if slices:
        options["num_slices"] = int(slices)
    if kind == "v4":
        options |= {"chip_config_name": "megacore"}  # one device per chip
    if kind == "gpu":
        if gpu_description is None:
            raise ValueError("a GPU topology needs --gpu, a file that describes the GPU")
        description = gpu_description.read_text()
        options = {"platform": "cuda", "topology_name": "", "topology": shape}
        options |= {"target_config": description}
    try:
        return topologies.get_topology_desc(**options).devices
    except RuntimeError as error:
        raise ValueError(f"topology {topology}: {str(error).splitlines()[0]}") from None


def compile_and_read(
    lowered: jax.stages.Lowered, compiler_options: dict | None = None
) -> tuple[jax.stages.Compiled, Program]:
    """The compiled program, and what the compiler wrote of it.

    Raises:
      DoesNotFitError: if the compiler runs out of device memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile({"xla_dump_to": folder, **(compiler_options or {})})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            lines = (line.strip() for line in str(error).splitlines())
            raise DoesNotFitError(next(line for line in lines if line)) from None
        return compiled, Program.from_dump(Path(folder))


def compile_step(
    run: RunConfig, devices: list, *, compiler_options: dict | None = None
) -> CompiledStep:
    """Compiles the training step of a run, the one that its loop runs, for devices elsewhere.

    Raises:
      DoesNotFitError: if the compiler runs out of device memory.
      ValueError: if mesh, batch and widths do not fit each other, or the chip is unknown.
    """
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise ValueError(f"nothing is known of {devices[0].device_kind}")
    model = run.model
    mesh = make_mesh(run.mesh, devices, num_channels=model.num_channels)
    check_batch_size(run.batch_size, mesh, run.microbatches)
    lowered = lower_train_step(run, mesh)
    compiled, program = compile_and_read(lowered, compiler_options)
    memory = compiled.memory_analysis()
    flops = training_flops(model, run.prefix_len, model.max_latents, run.latent_windows)
    return CompiledStep(
        chip=chip,
        num_devices=len(devices),
        mesh_shape=dict(mesh.shape),
        model_flops=run.batch_size * flops,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        cycles_by_part=program.cycles_by_part(),
        collectives=program.collectives(),
        kernels=program.kernels(),
    )
