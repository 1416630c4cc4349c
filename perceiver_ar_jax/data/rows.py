"""The arrays of a batch, by name, and the one place that fills them."""

import numpy as np


def pad_rows(
    num_rows: int, length: int, *, pad_id: int, with_segment_ids: bool
) -> dict[str, np.ndarray]:
    """Rows of pads, which `write_window` fills; the fields of `training.Batch`.

    Returns:
      tokens: (B, S) int32.
      targets: (B, S) int32, the next token at each position.
      pad_mask: (B, S) bool, True at pads.
      weights: (B, S) float32, the weight of each target; 0 at pads.
      segment_ids: (B, S) int32, only if asked for: 0 at pads, then 1, 2, ... for the documents of
        the window.
    """
    shape = (num_rows, length)
    rows = {
        "tokens": np.full(shape, pad_id, np.int32),
        "targets": np.full(shape, pad_id, np.int32),
        "pad_mask": np.ones(shape, bool),
        "weights": np.zeros(shape, np.float32),
    }
    return rows | ({"segment_ids": np.zeros(shape, np.int32)} if with_segment_ids else {})


def write_window(
    rows: dict[str, np.ndarray],
    row: int,
    stream: np.ndarray,
    segment_ids: np.ndarray,
    *,
    counted: np.ndarray | None = None,
) -> None:
    """Writes a left-padded window.

    Args:
      rows: from `pad_rows`; changed in place.
      row: which of them.
      stream: N + 1 tokens: those of the window and the target of the last one.
      segment_ids: of the N tokens, from 1.
      counted: of the N targets, which have weight 1; all by default.
    """
    size, length = rows["tokens"].shape[1], len(stream) - 1
    rows["tokens"][row, size - length :] = stream[:-1]
    rows["targets"][row, size - length :] = stream[1:]
    rows["pad_mask"][row, size - length :] = False
    rows["weights"][row, size - length :] = 1 if counted is None else counted
    if "segment_ids" in rows:
        rows["segment_ids"][row, size - length :] = segment_ids
