"""A checksum of an array that does not depend on how the array is sharded."""

from typing import Any

import jax
import jax.numpy as jnp

from perceiver_ar_jax.parallel import one_at_a_time


def checksums(tree: Any) -> dict[str, int]:
    """A 32-bit checksum of each leaf, by path, also of arrays sharded over processes.

    It is the sum, modulo 2^32, of a hash of every element's bits and index, computed on the devices
    that hold the leaf. So only one number per leaf is transferred, the result is the same on every
    mesh, and any change of a single element is detected.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    values = one_at_a_time(_checksum, (leaf for _, leaf in leaves))
    return {name: int(value) for name, value in zip(names, values, strict=True)}


@jax.jit
def _checksum(x):
    unsigned = f"uint{8 * x.dtype.itemsize}"
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros_like(bits)
    for dim, size in enumerate(x.shape):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    return _mixed(bits ^ _mixed(index)).sum(dtype=jnp.uint32)


def _mixed(x):
    """A bijection of 32 bits. Source: the finalizer of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
