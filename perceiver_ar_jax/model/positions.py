"""Where tokens stand, and the rotary rotation that tells attention how far apart they are."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig


class Rotation(NamedTuple):
    """Cosines and sines of the rotary angles, (B or 1, S, R/2) each, float32."""

    cos: jax.Array
    sin: jax.Array


def positions(length: int, pad_mask_BS: jax.Array | None = None) -> jax.Array:
    """Positions of left-padded rows, counted from each row's first real token; 0 at pads.

    Returns (B, S) int32, or (1, S) where nothing is padded. Source: `positions` of perceiver-io.
    """
    positions_S = jnp.arange(length, dtype=jnp.int32)[None]
    if pad_mask_BS is None:
        return positions_S
    pads_B1 = pad_mask_BS.sum(axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.maximum(positions_S - pads_B1, 0)


def positions_in_segments(segment_ids_BS: jax.Array) -> jax.Array:
    """Positions counted from the beginning of each run of equal segment ids, (B, S) int32."""
    positions_1S = positions(segment_ids_BS.shape[1])
    begins_BS = jnp.diff(segment_ids_BS, axis=1, prepend=segment_ids_BS[:, :1]) != 0
    return positions_1S - jax.lax.cummax(jnp.where(begins_BS, positions_1S, 0), axis=1)


def inverse_frequencies(config: PerceiverARConfig) -> np.ndarray:
    """Angle per position of each rotated pair, (R/2,) float32: stored ones, else the formula.

    Source: `FrequencyPositionEncoding` of perceiver-io; RoFormer (arXiv 2104.09864), section 3.2.
    """
    if config.rotary_inv_freq is not None:
        return np.asarray(config.rotary_inv_freq, np.float32)
    return _formula(config.rotary_dim)


@functools.cache
def _formula(dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(max(dim, 1))
    return np.float32(1.0) / np.power(np.float32(10000.0), exponents)


def rotation(positions_BS: jax.Array, config: PerceiverARConfig) -> Rotation:
    """Cosine and sine of position × inverse frequency, exact to 1e-6 rad at any int32 position.

    A float32 product is off by 0.03 rad at position 2²⁰. So angles are kept as 32-bit fractions
    of a full turn, where integer overflow is the reduction modulo 2π, and the part of the
    frequency below 2⁻³² turns is added from float32.
    """
    turns = inverse_frequencies(config).astype(np.float64) / (2 * math.pi) * 2**32
    whole = np.floor(turns)
    rest = (turns - whole).astype(np.float32)
    whole = (whole % 2**32).astype(np.uint32)
    positions_BS1 = positions_BS[..., None]
    fractions = positions_BS1.astype(jnp.uint32) * whole
    fractions += (positions_BS1.astype(jnp.float32) * rest).astype(jnp.uint32)
    return Rotation(*_cos_and_sin(fractions))


def _cos_and_sin(fractions):
    """Of uint32 fractions of a turn, by series within an eighth of a turn of the nearest quarter.

    Compilers fuse this into every rotation of every layer and head, where `jnp.cos` is dear. The
    first terms left out are below 2e-9.
    """
    quarters = (fractions + np.uint32(2**29)) >> 30
    rest = jax.lax.bitcast_convert_type(fractions - (quarters << 30), jnp.int32)
    angles = rest.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
    squares = jnp.square(angles)
    cos = jnp.polyval(_COS_SERIES, squares)
    sin = jnp.polyval(_SIN_SERIES, squares) * angles
    is_odd = quarters & 1 == 1
    cos, sin = jnp.where(is_odd, sin, cos), jnp.where(is_odd, cos, sin)
    return jnp.where((quarters + 1) & 2 == 2, -cos, cos), jnp.where(quarters & 2 == 2, -sin, sin)


_COS_SERIES, _SIN_SERIES = (
    np.float32([(-1) ** (n // 2) / math.factorial(n) for n in range(highest, -1, -2)])
    for highest in (10, 9)
)


def rotate(x_BSNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the leading channels of each head; the rest pass.

    Channel i of the first half pairs with channel i of the second half. perceiver-io pairs
    neighbours instead; conversion reorders the projections once, so that here both halves are
    contiguous.
    """
    half = rotation.cos.shape[-1]
    cos, sin = (angle[:, :, None].astype(x_BSNH.dtype) for angle in rotation)
    first, second, rest = jnp.split(x_BSNH, [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
