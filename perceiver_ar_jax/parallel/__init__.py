from perceiver_ar_jax.parallel.mesh import (
    MeshConfig,
    batch_share,
    check_batch_size,
    make_mesh,
    use_mesh,
)
from perceiver_ar_jax.parallel.sharding import (
    batch_sharding,
    constrain,
    on_own_rows,
    replicated,
    state_shardings,
    to_global,
)

__all__ = [
    "MeshConfig",
    "batch_sharding",
    "batch_share",
    "check_batch_size",
    "constrain",
    "make_mesh",
    "on_own_rows",
    "replicated",
    "state_shardings",
    "to_global",
    "use_mesh",
]
