from perceiver_ar_jax.parallel.mesh import (
    CONTEXT,
    MeshConfig,
    batch_share,
    check_batch_size,
    make_mesh,
    use_mesh,
)
from perceiver_ar_jax.parallel.processes import (
    check_agreement,
    gather,
    is_first,
    join_processes,
    on_first,
    one_at_a_time,
)
from perceiver_ar_jax.parallel.sharding import (
    batch_sharding,
    constrain,
    has_context,
    on_own_keys,
    on_own_rows,
    replicated,
    shardings_by_path,
    to_global,
)

__all__ = [
    "CONTEXT",
    "MeshConfig",
    "batch_sharding",
    "batch_share",
    "check_agreement",
    "check_batch_size",
    "constrain",
    "gather",
    "has_context",
    "is_first",
    "join_processes",
    "make_mesh",
    "on_first",
    "on_own_keys",
    "on_own_rows",
    "one_at_a_time",
    "replicated",
    "shardings_by_path",
    "to_global",
    "use_mesh",
]
