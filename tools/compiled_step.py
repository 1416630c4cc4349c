"""Compiles a run's training step for a machine that is not there, and says what it will take."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from xla_dump import Collective, Program

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model import PerceiverAR, init_params
from perceiver_ar_jax.model.flops import training_flops
from perceiver_ar_jax.parallel import (
    MeshConfig,
    batch_sharding,
    check_batch_size,
    make_mesh,
    state_shardings,
    use_mesh,
)
from perceiver_ar_jax.parallel.chips import Chip, chip_of
from perceiver_ar_jax.training import Batch, OptimizerConfig, TrainState, make_optimizer, train_step

# What libtpu must find in the environment on a machine that has no TPU.
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor a device to hold
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any: it complains where it finds none
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
    model_flops: int  # of all devices together, what is computed again not counted
    argument_bytes: int  # parameters, moments and batch; they stay
    temporary_bytes: int  # activations, gradients, gathered weights
    program_bytes: int
    cycles_by_part: dict[str, int]
    collectives: list[Collective]

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
    def mfu_ceiling(self) -> float | None:
        """Model FLOPs utilisation if exchanges and Pallas kernels took no time."""
        if not self.cycles or not self.chip.clock_hz:
            return None
        seconds = self.cycles / self.chip.clock_hz
        return self.model_flops / self.num_devices / self.chip.peak_flops / seconds


def topology_devices(topology: str, gpu_description: Path | None = None) -> list:
    """Devices of `v5e:16x16` and the like, or of `gpu:1x1x8` (GPUs, hosts … as XLA counts).

    Raises:
      ValueError: if there is no such topology, or the package that knows it is not installed.
    """
    kind, _, shape = topology.partition(":")
    options = {"platform": "tpu", "topology_name": topology}
    if kind == "v4":
        options |= {"chip_config_name": "megacore"}  # one device a chip
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


def compile_step(
    model_config: PerceiverARConfig,
    optimizer_config: OptimizerConfig,
    mesh_config: MeshConfig,
    devices: list,
    *,
    batch_size: int,
    microbatches: int = 1,
    compiler_options: dict | None = None,
) -> CompiledStep:
    """Compiles the training step of `train_loop` for devices that need not exist.

    Raises:
      DoesNotFitError: if the compiler runs out of device memory.
      ValueError: if mesh, batch and widths do not fit each other, or the chip is unknown.
    """
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise ValueError(f"nothing is known of {devices[0].device_kind}")
    lowered = _lower(
        model_config,
        optimizer_config,
        make_mesh(mesh_config, devices),
        batch_size=batch_size,
        microbatches=microbatches,
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile({"xla_dump_to": folder, **(compiler_options or {})})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            lines = (line.strip() for line in str(error).splitlines())
            raise DoesNotFitError(next(line for line in lines if line)) from None
        program = Program.from_dump(Path(folder))
    memory = compiled.memory_analysis()
    prefix_len = model_config.max_prefix_len
    return CompiledStep(
        chip=chip,
        num_devices=len(devices),
        model_flops=batch_size * training_flops(model_config, prefix_len, model_config.max_latents),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        cycles_by_part=program.cycles_by_part(),
        collectives=program.collectives(),
    )


def _lower(model_config, optimizer_config, mesh, *, batch_size, microbatches):
    check_batch_size(batch_size, mesh, microbatches)
    key = jax.random.key(0)
    model, tx = PerceiverAR(model_config), make_optimizer(optimizer_config)
    state = jax.eval_shape(lambda: TrainState.create(params=init_params(model, key), tx=tx))
    shardings = state_shardings(state, mesh)
    state = jax.tree.map(_on_device, state, shardings)

    def rows(dtype):
        shape = (batch_size, model_config.max_seq_len)
        return _on_device(jax.ShapeDtypeStruct(shape, dtype), batch_sharding(mesh))

    step = functools.partial(
        train_step,
        model=model,
        prefix_len=model_config.max_prefix_len,
        key=key,
        microbatches=microbatches,
    )
    batch = Batch(rows(jnp.int32), rows(jnp.int32), rows(jnp.bool_))
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return jitted.lower(state, batch)


def _on_device(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
