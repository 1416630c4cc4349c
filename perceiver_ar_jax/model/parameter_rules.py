from typing import Any

from jax.sharding import Mesh

from perceiver_ar_jax.parallel import shardings_by_path

# Logical axes of parameters by path; the first pattern that matches counts. Moments of the
# optimizer end in the same paths, and so are laid out as their parameters are.
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


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter, or of every shape of one.

    Raises:
      ValueError: if a dimension does not divide among its devices.
    """
    return shardings_by_path(params, mesh, PARAMETER_RULES)
