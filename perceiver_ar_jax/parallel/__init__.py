from perceiver_ar_jax.parallel.mesh import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    state_shardings,
    to_global,
)

__all__ = [
    "MeshConfig",
    "batch_sharding",
    "make_mesh",
    "replicated",
    "state_shardings",
    "to_global",
]
