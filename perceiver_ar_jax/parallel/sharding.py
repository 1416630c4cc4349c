"""How parameters, batches and activations lie on the mesh: logical axes and one table of rules."""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.parallel.mesh import BATCH_AXES, CONTEXT, FSDP, TENSOR

# Logical axes of arrays, and the mesh axes they are cut along.
LOGICAL_RULES = {
    "batch": BATCH_AXES,
    "prefix": (CONTEXT,),
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-parallel devices, each row whole."""
    return NamedSharding(mesh, _spec(("batch",)))


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


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Lays out an activation by the logical names of its dimensions; nothing without a mesh.

    The mesh is that of the `use_mesh` around the traced call. A dimension that does
    not divide among its devices (one prompt among eight of them) stays whole, as do axes that a
    surrounding `shard_map` has already cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = _spec(logical)
    return jax.lax.with_sharding_constraint(
        x,
        PartitionSpec(
            *(_fitting(axes, size, mesh) for axes, size in zip(spec, x.shape, strict=True))
        ),
    )


def _spec(logical: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(LOGICAL_RULES[axis] if axis else None for axis in logical))


def _fitting(axes: tuple[str, ...] | None, size: int, mesh: AbstractMesh):
    axes = tuple(axis for axis in axes or () if axis not in mesh.manual_axes)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _leaf_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    if not shape:
        return replicated(mesh)
    logical = next((axes for pattern, axes in PARAMETER_RULES if re.search(pattern, path)), None)
    if logical is None or len(logical) != len(shape):
        raise ValueError(f"no sharding rule for {path} of shape {shape}")
    spec = _spec(logical)
    for axes, size in zip(spec, shape, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"{path} of shape {shape}: {size} does not divide by {'×'.join(axes)} = {parts}"
            )
    return NamedSharding(mesh, spec)
