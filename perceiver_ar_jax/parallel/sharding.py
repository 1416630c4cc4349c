"""How parameters, batches and activations lie on the mesh: logical axes and one table of rules."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from perceiver_ar_jax.parallel.mesh import BATCH_AXES, CONTEXT, FSDP, TENSOR

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

# Logical axes of arrays, and the mesh axes they are cut along.
LOGICAL_RULES = {
    "batch": BATCH_AXES,
    "keys": (CONTEXT,),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all data-parallel devices, each row whole."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings_by_path(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every leaf of a tree, by its path; scalars are replicated.

    Args:
      tree: arrays or their shapes.
      mesh: the mesh.
      rules: pairs of a pattern over paths (`a/b/kernel`) and the logical axes of the leaves whose
        path it finds; the first that matches counts.

    Raises:
      ValueError: if no rule covers a leaf, or a dimension does not divide among its devices.
    """

    def sharding_of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return _leaf_sharding(name, leaf.shape, mesh, rules)

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


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
    dimensions = zip(_mesh_axes(logical), x.shape, strict=True)
    spec = PartitionSpec(*(_fitting(axes, size, mesh) for axes, size in dimensions))
    return jax.lax.with_sharding_constraint(x, spec)


def on_own_rows(
    function: Callable[..., tuple], *, in_rows: Sequence[bool], out_rows: Sequence[bool]
) -> Callable[..., tuple]:
    """`function`, run by each device on its own rows of the batch, sums taken once at its end.

    Left to itself, the compiler adds up gradients over devices in every turn of a loop. Without a
    mesh, and where the rows do not divide, it is the plain function.

    Args:
      function: of arrays or trees, to a tuple.
      in_rows: for each argument, whether its leading dimension is the batch.
      out_rows: the same for each result; those that are not are summed over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes
    )
    parts = math.prod(mesh.shape[axis] for axis in axes)

    def local(*arguments):
        results = zip(function(*arguments), out_rows, strict=True)
        return tuple(x if rows else jax.lax.psum(x, axes) for x, rows in results)

    def spread(*arguments):
        cut = [x for x, rows in zip(arguments, in_rows, strict=True) if rows]
        if not axes or any(len(leaf) % parts for leaf in jax.tree.leaves(cut)):
            return function(*arguments)
        in_specs, out_specs = (
            tuple(PartitionSpec(axes) if rows else PartitionSpec() for rows in flags)
            for flags in (in_rows, out_rows)
        )
        return jax.shard_map(
            local, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
        )(*arguments)

    return spread


def has_context(num_keys: int) -> bool:
    """Whether the mesh in use has a context axis among whose devices so many keys divide."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if CONTEXT in mesh.manual_axes else mesh.shape.get(CONTEXT, 1)
    return parts > 1 and num_keys % parts == 0


def on_own_keys(
    function: Callable[..., tuple], axis: str, *, in_specs: tuple, out_specs: tuple
) -> Callable[..., tuple]:
    """`function`, run by each device of a mesh axis on its own part of the arrays.

    Args:
      function: of arrays or trees, to a tuple.
      axis: the only mesh axis that is cut along; the others stay the compiler's.
      in_specs: a PartitionSpec for each argument, or for each leaf of it.
      out_specs: the same for the results; those that do not name the axis are equal on all devices.
    """
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names={axis}, check_vma=False
    )


def on_own_parts(
    function: Callable[..., tuple], *, sizes: dict[str, int], in_axes: tuple, out_axes: tuple
) -> Callable[..., tuple]:
    """`function`, run by each device on its own part of the arrays: nothing is the compiler's.

    Without a mesh it is the plain function.

    Args:
      function: of arrays or trees, to a tuple.
      sizes: of each logical axis that is cut, if it divides among its devices.
      in_axes: the logical names of the dimensions of each argument, or of each leaf of it.
      out_axes: the same for each result; those that do not name an axis are equal on its devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    own = set(mesh.axis_names) - set(mesh.manual_axes)
    if not own:
        return function
    cut = {name: _fitting(LOGICAL_RULES[name], size, mesh) or None for name, size in sizes.items()}

    def specs(axes):
        to_spec = lambda names: PartitionSpec(*map(cut.get, names))
        return jax.tree.map(to_spec, axes, is_leaf=_are_names)

    return jax.shard_map(
        function,
        in_specs=specs(in_axes),
        out_specs=specs(out_axes),
        axis_names=own,
        check_vma=False,
    )


def platform_in_use() -> str:
    """`tpu`, `gpu` or `cpu`: of the mesh in use, otherwise of this process."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_kind_in_use() -> str:
    """What the devices of the mesh in use call themselves, otherwise those of this process."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind


def num_devices_in_use() -> int:
    """Of the mesh in use, otherwise 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _are_names(x: Any) -> bool:
    return type(x) is tuple and all(name is None or name in LOGICAL_RULES for name in x)


def _mesh_axes(logical: Iterable[str | None]) -> list[tuple[str, ...]]:
    return [LOGICAL_RULES[axis] if axis else () for axis in logical]


def _fitting(axes: tuple[str, ...], size: int, mesh: AbstractMesh) -> tuple[str, ...] | None:
    axes = tuple(axis for axis in axes if axis not in mesh.manual_axes)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _leaf_sharding(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> NamedSharding:
    if not shape:
        return replicated(mesh)
    logical = next((axes for pattern, axes in rules if re.search(pattern, path)), None)
    if logical is None or len(logical) != len(shape):
        raise ValueError(f"no sharding rule for {path} of shape {shape}")
    spec = _mesh_axes(logical)
    for axes, size in zip(spec, shape, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"{path} of shape {shape}: {size} does not divide by {'×'.join(axes)} = {parts}"
            )
    return NamedSharding(mesh, PartitionSpec(*(axes or None for axes in spec)))
