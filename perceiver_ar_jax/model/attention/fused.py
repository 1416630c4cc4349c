import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from perceiver_ar_jax.model.attention.dropout import Dropout
from perceiver_ar_jax.model.attention.merge import merge
from perceiver_ar_jax.model.attention.visibility import Visibility
from perceiver_ar_jax.parallel import on_own_parts

OF_QUERIES = ("batch", None, "heads", None)  # BLNH
OF_KEYS = ("batch", "keys", "heads", None)  # BKNH
OF_STATISTICS = ("batch", "heads", None)  # BNL


def fused(forward: Callable, backward: Callable) -> Callable:
    """An implementation of attention made of a library's kernels, which the compiler cannot cut.

    Each device runs them on its own rows, heads and, with a mesh axis, keys.

    Args:
      forward: q_BLNH, k_BKNH, v_BKNH and visibility to output (B, L, N, H) and log-sum-exp
        (B, N, L).
      backward: those four, output, log-sum-exp and the gradients of both to (dq, dk, dv); None
        stands for the gradient of a log-sum-exp that nothing reads.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
    def attend(
        q_BLNH: jax.Array,
        k_BKNH: jax.Array,
        v_BKNH: jax.Array,
        visibility: Visibility,
        dropout: Dropout | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `recompute.attend`, but without dropout: kernels drop no weights."""
        return run_forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout, axis)[0]

    def keep(*primals):
        is_primal = lambda x: hasattr(x, "perturbed")
        values = jax.tree.map(lambda x: x.value, primals[:-1], is_leaf=is_primal)
        return run_forward(*values, primals[-1])

    def run_forward(q_BLNH, k_BKNH, v_BKNH, visibility, dropout, axis):
        if dropout is not None:
            raise ValueError("fused attention has no dropout of weights; use `recompute`")
        arguments = q_BLNH, k_BKNH, v_BKNH, visibility
        out_BLNH, lse_BNL = forward_on_parts(forward, *arguments, axis=axis)
        out_BLNH = checkpoint_name(out_BLNH, "attention_out")
        lse_BNL = checkpoint_name(lse_BNL, "statistics")
        return (out_BLNH, lse_BNL), (*arguments, out_BLNH, lse_BNL)

    def differentiate(axis, saved, gradients):
        dout_BLNH, dlse_BNL = gradients
        if isinstance(dout_BLNH, SymbolicZero):
            dout_BLNH = jnp.zeros(dout_BLNH.shape, dout_BLNH.dtype)
        if isinstance(dlse_BNL, SymbolicZero):
            dlse_BNL = None
        arguments = (*saved, dout_BLNH, dlse_BNL)
        return *backward_on_parts(backward, *arguments, axis=axis), None, None

    attend.defvjp(keep, differentiate, symbolic_zeros=True)
    return attend


def forward_on_parts(forward, *arguments, axis: str | None = None):
    """Each device runs a kernel's forward pass on its own part; keys may lie on a mesh axis."""

    def run(*arguments):
        out_BLNH, lse_BNL = forward(*arguments)
        return (out_BLNH, lse_BNL) if axis is None else merge([(out_BLNH, lse_BNL)], axis)

    return _on_own_parts(run, arguments, axis, out_axes=(OF_QUERIES, OF_STATISTICS))


def backward_on_parts(backward, *arguments, axis: str | None = None):
    """The same of its backward pass."""

    def run(*arguments):
        dq_BLNH, dk_BKNH, dv_BKNH = backward(*arguments)
        return dq_BLNH if axis is None else jax.lax.psum(dq_BLNH, axis), dk_BKNH, dv_BKNH

    return _on_own_parts(run, arguments, axis, out_axes=(OF_QUERIES, OF_KEYS, OF_KEYS))


def _on_own_parts(run, arguments, axis, *, out_axes):
    q_BLNH, k_BKNH, _, visibility, *_ = arguments
    sizes = {"batch": q_BLNH.shape[0], "heads": q_BLNH.shape[2]}
    if axis is not None:
        sizes["keys"] = k_BKNH.shape[1]
    of_visibility = visibility.replace(
        pad_mask_BK=("batch", "keys"),
        segment_ids_BL=("batch", None),
        segment_ids_BK=("batch", "keys"),
    )
    in_axes = (OF_QUERIES, OF_KEYS, OF_KEYS, of_visibility, *(OF_QUERIES, OF_STATISTICS) * 2)
    in_axes = in_axes[: len(arguments)]
    return on_own_parts(run, sizes=sizes, in_axes=in_axes, out_axes=out_axes)(*arguments)
