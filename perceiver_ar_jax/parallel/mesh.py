"""The device mesh, the names of its axes, and which rows of a batch each process feeds."""

import contextlib
import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

DATA, FSDP, TENSOR, CONTEXT = AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = (DATA, FSDP)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; one of them may be -1, the rest of all.

    With `max_fsdp` above 0, `data` and `fsdp` may both be -1: fsdp is then the largest size up to
    `max_fsdp` that divides the devices, and data the rest.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    max_fsdp: int = 0  # of a mesh with data=-1 and fsdp=-1

    @property
    def is_fitted(self) -> bool:
        """Whether the size of fsdp follows from the number of devices."""
        return self.max_fsdp > 0 and self.data == -1 and self.fsdp == -1

    def sizes(
        self, num_devices: int, num_channels: int | None = None, num_slices: int = 1
    ) -> tuple[int, ...]:
        """The size of each axis on so many devices.

        Args:
          num_devices: of the whole mesh.
          num_channels: what fsdp divides; a fitted size is a divisor of it.
          num_slices: into which the devices are divided; only `data` may span several.

        Raises:
          ValueError: if the axes do not multiply to the number of devices, or slices do not divide
            the data axis; says the arithmetic.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        product = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        if any(size == 0 or size < -1 for size in sizes) or self.max_fsdp < 0:
            raise ValueError(f"mesh {product}: sizes are positive, or -1 for the rest")
        if sizes.count(-1) > 1 and not (self.is_fitted and sizes.count(-1) == 2):
            raise ValueError(
                f"mesh {product}: at most one size is -1, or data and fsdp together with max_fsdp"
            )
        known = math.prod(size for size in sizes if size != -1)
        if -1 not in sizes and known != num_devices:
            raise ValueError(f"mesh {product} = {known} devices, but there are {num_devices}")
        if num_devices % known:
            raise ValueError(f"mesh {product}: {num_devices} devices are not a multiple of {known}")
        rest = num_devices // known
        if self.is_fitted:
            fsdp = math.gcd(rest // num_slices, num_channels or 0)  # gcd(n, 0) is n
            sizes[AXES.index(FSDP)] = next(
                size for size in range(min(self.max_fsdp, fsdp), 0, -1) if fsdp % size == 0
            )
            rest //= sizes[AXES.index(FSDP)]
        if -1 in sizes:
            sizes[sizes.index(-1)] = rest
        data = sizes[AXES.index(DATA)]
        if data % num_slices:
            raise ValueError(
                f"mesh data={data} does not divide among {num_slices} slices, and the other axes "
                "must not span them"
            )
        return tuple(sizes)


def make_mesh(
    config: MeshConfig,
    devices: list[jax.Device] | None = None,
    *,
    num_channels: int | None = None,
) -> Mesh:
    """The mesh over all devices; neighbours on an axis are neighbours on a TPU's torus.

    Of several TPU slices, which only a network connects, the first are first on the data axis; all
    other axes lie within a slice.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or slices do not divide the
        data axis; says the arithmetic.
    """
    devices = jax.devices() if devices is None else devices
    slices = num_slices(devices)
    data, *others = config.sizes(len(devices), num_channels, slices)
    if slices == 1:
        placed = mesh_utils.create_device_mesh(
            (data, *others), devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *others),
            (slices, *(1 for _ in others)),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(placed, AXES)


def num_slices(devices: list[jax.Device]) -> int:
    """Of how many TPU slices the devices are; 1 of others."""
    if devices[0].platform != "tpu":  # GPUs count each host as a slice
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def check_batch_size(batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises ValueError with the arithmetic if a batch does not divide among the devices."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (parts * microbatches):
        axes = " × ".join(f"{axis}={mesh.shape[axis]}" for axis in BATCH_AXES)
        times = f" × {microbatches} microbatches" if microbatches > 1 else ""
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of {axes}{times} = {parts * microbatches}"
        )


def batch_share(mesh: Mesh, process_index: int | None = None) -> tuple[int, int]:
    """Which part of each batch a process feeds, as (index, count).

    Processes that hold the same rows, on other tensor or context coordinates, feed the same part.

    Raises:
      ValueError: if the rows of two processes overlap in part.
    """
    process_index = jax.process_index() if process_index is None else process_index
    rows = mesh.devices.reshape(mesh.shape[DATA] * mesh.shape[FSDP], -1)
    rows_of = {}
    for row, devices in enumerate(rows):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(held)) for held in rows_of.values()})
    if sum(map(len, shares)) != len(rows):
        raise ValueError(
            f"processes share rows of the batch in part: they hold {shares} of "
            f"{len(rows)} row groups; choose data × fsdp a multiple of the number of processes"
        )
    return shares.index(tuple(sorted(rows_of[process_index]))), len(shares)


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """What is traced inside lays out its activations on the mesh; arrays stay where they are."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
