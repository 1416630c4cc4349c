"""The device mesh, its axis names, and how parameters and batches lie on it."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR, CONTEXT = AXES = ("data", "fsdp", "tensor", "context")

# Logical axes of arrays, and the mesh axes they are cut along.
LOGICAL_RULES = {
    "batch": (DATA, FSDP),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
}

# Logical axes of parameters by path; the first pattern that matches counts. Moments of the
# optimizer end in the same paths, and so lie as their parameters do.
PARAMETER_RULES = (
    (r"token_embedding/embedding$", ("vocab", "embed")),
    (r"position_embedding/embedding$", (None, "embed")),
    (r"[qkv]_proj/kernel$", ("embed", "heads")),
    (r"o_proj/kernel$", ("heads", "embed")),
    (r"mlp/up/kernel$", ("embed", "mlp")),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"output_bias$", ("vocab",)),
    (r"(norm/scale|norm/bias|o_proj/bias)$", (None,)),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; one of them may be -1, the rest of all."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices.

    Raises:
      ValueError: if the axes do not multiply to the number of devices; says the arithmetic.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(dataclasses.astuple(config))
    product = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh {product}: sizes are positive, at most one of them -1")
    if -1 in sizes:
        if len(devices) % known:
            raise ValueError(f"mesh {product}: {len(devices)} devices are no multiple of {known}")
        sizes[sizes.index(-1)] = len(devices) // known
    elif known != len(devices):
        raise ValueError(f"mesh {product} = {known} devices, but there are {len(devices)}")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-parallel devices, each row whole."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a train state or of parameters, by its path.

    Raises:
      ValueError: if no rule covers a leaf, or a dimension does not divide among its devices.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _leaf_sharding(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh
        ),
        abstract_state,
    )


def to_global(batch: Any, mesh: Mesh) -> Any:
    """Arrays of this process's rows to arrays of all rows, spread over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _leaf_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    if not shape:
        return replicated(mesh)
    logical = next((axes for pattern, axes in PARAMETER_RULES if re.search(pattern, path)), None)
    if logical is None or len(logical) != len(shape):
        raise ValueError(f"no sharding rule for {path} of shape {shape}")
    spec = [LOGICAL_RULES[axis] if axis else None for axis in logical]
    for axes, size in zip(spec, shape, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in axes or ())
        if size % parts:
            raise ValueError(
                f"{path} of shape {shape}: {size} does not divide by {'×'.join(axes)} = {parts}"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))
