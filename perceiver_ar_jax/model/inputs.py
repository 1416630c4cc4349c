"""Token ids, and what attention needs to know of them: positions, padding and documents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from perceiver_ar_jax.model.attention import Visibility
from perceiver_ar_jax.model.latent_windows import as_rows
from perceiver_ar_jax.model.positions import positions, positions_in_segments


class Inputs(NamedTuple):
    """Consecutive columns of left-padded rows."""

    tokens_BS: jax.Array
    positions_BS: jax.Array  # (1, S) where all rows have the same
    pad_mask_BS: jax.Array | None  # True at pads
    segment_ids_BS: jax.Array | None  # the document of each token

    @classmethod
    def of(
        cls,
        tokens_BS: jax.Array,
        pad_mask_BS: jax.Array | None = None,
        segment_ids_BS: jax.Array | None = None,
    ) -> "Inputs":
        """Whole rows; positions count from the first real token, or from each document's first."""
        if segment_ids_BS is None:
            positions_BS = positions(tokens_BS.shape[1], pad_mask_BS)
        else:
            positions_BS = positions_in_segments(segment_ids_BS)
        return cls(tokens_BS, positions_BS, pad_mask_BS, segment_ids_BS)

    @property
    def length(self) -> int:
        """The number of columns."""
        return self.tokens_BS.shape[1]

    def split(self, prefix_len: int) -> tuple["Inputs", "Inputs"]:
        """Prefix and latents."""
        return (
            jax.tree.map(lambda x_BS: x_BS[:, :prefix_len], self),
            jax.tree.map(lambda x_BS: x_BS[:, prefix_len:], self),
        )

    def columns(self, start: jax.Array | int, size: int) -> "Inputs":
        """`size` consecutive columns."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), self)

    def in_windows(self, num_windows: int) -> "Inputs":
        """Equal parts of each row, as rows of their own: (B·W, S / W)."""
        if num_windows == 1:
            return self
        return jax.tree.map(lambda x_BS: as_rows(x_BS, num_windows), self.with_all_positions())

    def gather(self, columns_BK: jax.Array) -> "Inputs":
        """Some columns of each row."""
        take = lambda x_BS: jnp.take_along_axis(x_BS, columns_BK, axis=1)
        return jax.tree.map(take, self.with_all_positions())

    def with_all_positions(self) -> "Inputs":
        """Positions of every row, (B, S), also where all rows have the same."""
        positions_BS = jnp.broadcast_to(self.positions_BS, self.tokens_BS.shape)
        return self._replace(positions_BS=positions_BS)

    def visible_from(self, latents: "Inputs", *, causal: bool) -> Visibility:
        """What the latents see of these columns: of a prefix all, of themselves causally."""
        return Visibility(
            pad_mask_BK=self.pad_mask_BS,
            segment_ids_BL=latents.segment_ids_BS,
            segment_ids_BK=self.segment_ids_BS,
            causal=causal,
        )
