"""Prompts as users give them, checked, padded and cut into prefix and latents."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig

SMALLEST_BUCKET = 64


class Prompt(NamedTuple):
    """Left-padded rows of token ids and where their pads are, (B, S) each, and the latents' share.

    Pads carry token id 0, whatever they were.
    """

    tokens_BS: np.ndarray
    pad_mask_BS: np.ndarray
    prefix_len: int


def padded_rows(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of any lengths as one array, padded on the left, and its pad mask."""
    length = max(map(len, rows), default=0)
    pads_B = np.array([length - len(row) for row in rows])
    pad_mask_BS = np.arange(length) < pads_B[:, None]
    tokens_BS = np.full((len(rows), length), pad_token_id, np.int64)
    tokens_BS[~pad_mask_BS] = [token for row in rows for token in row]
    return tokens_BS, pad_mask_BS


def in_bucket(
    tokens_BS: np.ndarray, pad_mask_BS: np.ndarray, num_latents: int, config: PerceiverARConfig
) -> Prompt:
    """Pads a prompt on the left to one of few shapes, so that few are compiled.

    Pads are masked, so that they change nothing; only the prefix varies in length.

    Raises:
      ValueError: where a length or a token id is out of range, or a row is not left-padded.
    """
    _check_lengths(tokens_BS.shape[1], num_latents, config)
    _check_pads(pad_mask_BS)
    _check_tokens(tokens_BS, pad_mask_BS, config.vocab_size)
    missing = max(num_latents - tokens_BS.shape[1], 0)
    prefix_len = tokens_BS.shape[1] + missing - num_latents
    bucket = min(bucket_size(prefix_len), config.max_prefix_len)
    more = ((0, 0), (missing + bucket - prefix_len, 0))
    tokens_BS = np.where(pad_mask_BS, 0, tokens_BS).astype(np.int32)
    pad_mask_BS = np.pad(pad_mask_BS, more, constant_values=True)
    return Prompt(np.pad(tokens_BS, more), pad_mask_BS, bucket)


def bucket_size(length: int) -> int:
    """The next power of two, not below 64."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()) if length else SMALLEST_BUCKET


def _check_lengths(length, num_latents, config):
    if not 0 < length <= config.max_seq_len:
        raise ValueError(f"Input sequence length out of valid range [1..{config.max_seq_len}]")
    if not 0 < num_latents <= config.max_latents:
        raise ValueError(f"num_latents={num_latents} out of valid range [1..{config.max_latents}]")
    least = length - config.max_prefix_len
    if num_latents < least:
        raise ValueError(
            f"For given sequence of length={length}, num_latents must "
            f"be in range [{least}..{config.max_latents}]"
        )


def _check_pads(pad_mask_BS):
    for row, pads in enumerate(pad_mask_BS):
        if pads.all():
            raise ValueError(f"row {row} of the prompt is empty")
        if (pads[1:] > pads[:-1]).any():
            raise ValueError(f"row {row} of the prompt has pads that are not on the left")


def _check_tokens(tokens_BS, pad_mask_BS, vocab_size):
    wrong_BS = ((tokens_BS < 0) | (tokens_BS >= vocab_size)) & ~pad_mask_BS
    if wrong_BS.any():
        row, column = np.argwhere(wrong_BS)[0]
        raise ValueError(
            f"token id {tokens_BS[row, column]} in row {row}, column {column} of the prompt "
            f"is out of valid range [0..{vocab_size})"
        )
