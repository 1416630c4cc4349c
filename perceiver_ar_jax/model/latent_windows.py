"""Several windows of latents over one sequence, each of which reads everything before it.

Of P + W·L positions all but the first P are latents: W windows of L. Each window gives what it
would give as the latents of a sequence that ends with it, but keys and values of the prefix are
computed once, and the layers over latents see the windows as rows of one batch.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention import Attention, attend_to_nothing, merge


def as_rows(x: jax.Array, num_windows: int) -> jax.Array:
    """(B, W·L, ...) to (B·W, L, ...): each window a row."""
    batch, length = x.shape[:2]
    return x.reshape(batch * num_windows, length // num_windows, *x.shape[2:])


def as_sequences(x: jax.Array, num_windows: int) -> jax.Array:
    """The inverse of `as_rows`."""
    rows, length = x.shape[:2]
    return x.reshape(rows // num_windows, num_windows * length, *x.shape[2:])


def attend_before(parts: Sequence[Attention], num_windows: int) -> Attention:
    """Attention to all parts of what is before a window, of queries that are rows.

    Each part attends from the queries of whole sequences, (B, W·L, N, H).
    """

    def attend(q_BLNH):
        q_BLNH = as_sequences(q_BLNH, num_windows)
        out_BLNH, lse_BNL = merge([part(q_BLNH) for part in parts])
        lse_BLN = as_rows(jnp.swapaxes(lse_BNL, 1, 2), num_windows)
        return as_rows(out_BLNH, num_windows), jnp.swapaxes(lse_BLN, 1, 2)

    return attend


def attend_to_earlier(
    attend: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]], num_windows: int
) -> Attention:
    """Attention of each window to the windows before it; the first sees nothing.

    Args:
      attend: of the queries (B, L, N, H) of a window and its number.
      num_windows: the number of windows.
    """

    def attend_all(q_BLNH):
        first, *others = jnp.split(q_BLNH, num_windows, axis=1)
        results = [attend_to_nothing(first)]
        results += [attend(q_BLNH, window) for window, q_BLNH in enumerate(others, start=1)]
        outs, lses = zip(*results, strict=True)
        return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)

    return attend_all
