"""Matrix products, in the formulation that is fast on the platform they are lowered for."""

import re

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from perceiver_ar_jax.parallel import num_devices_in_use, platform_in_use


def product(
    subscripts: str, a: jax.Array, b: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype; not to be differentiated.

    Args:
      subscripts: such as "BLD,DF->BLF".
      a: the left operand.
      b: the right operand.
      dtype: of the result, the operands' by default. On CPU bfloat16 is summed in float32 whatever
        the result is in.
    """
    dtype = jnp.dtype(a.dtype if dtype is None else dtype)
    if platform_in_use() == "cpu":
        return _on_cpu(subscripts, a, b, dtype)
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def _on_cpu(subscripts, a, b, dtype):
    left, right, result = re.split(",|->", subscripts)
    summed_last = "".join(sorted(left, key=lambda letter: letter not in result))
    is_bfloat16 = a.dtype == jnp.bfloat16
    is_batched = any(letter in right for letter in left if letter in result)
    if summed_last != left and (is_bfloat16 or not is_batched):
        # XLA's CPU matmul is slow where its left side is transposed; the barrier makes it transpose
        # first. Where there are batch dimensions, float32 is as fast without.
        axes = [left.index(letter) for letter in summed_last]
        a = jax.lax.optimization_barrier(jnp.transpose(a, axes))
        left = summed_last
    if is_bfloat16 and num_devices_in_use() == 1:  # among several it would gather the operands
        # Twice as fast as float32, if sums are float32 and operands lie row by row in memory, which
        # XLA would not care about: it takes a transposition for another layout of the same array.
        a, b = (with_layout_constraint(x, Layout(tuple(range(x.ndim)))) for x in (a, b))
    kind = jnp.float32 if is_bfloat16 else dtype
    result = jnp.einsum(f"{left},{right}->{result}", a, b, preferred_element_type=kind)
    return result.astype(dtype)
