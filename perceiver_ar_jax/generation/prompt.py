"""Prompts as users give them: checked, padded on the left, rounded to one of a few shapes."""

from collections.abc import Sequence

import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig

SMALLEST_BUCKET = 64


def as_rows(
    prompt: np.ndarray | Sequence[Sequence[int]], pad_mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and pad mask, (B, S) each; rows of different lengths are padded on the left.

    Raises:
      ValueError: if these are not rows of whole numbers, the shapes differ, or pads are not on
        the left.
    """
    _check_kind(prompt)
    given_mask = pad_mask is not None
    if not given_mask and isinstance(prompt, list | tuple) and all(map(_is_row, prompt)):
        prompt, pad_mask = _padded(prompt)
    tokens_BS = np.asarray(prompt)
    if tokens_BS.ndim != 2:
        hint = "; for a single prompt pass [ids]" if tokens_BS.ndim == 1 else ""
        raise ValueError(
            f"a prompt is rows of token ids, (B, S), not of shape {tokens_BS.shape}{hint}"
        )
    if not np.issubdtype(tokens_BS.dtype, np.integer):
        raise ValueError(f"token ids are whole numbers, not {tokens_BS.dtype}")
    pad_mask_BS = np.zeros(tokens_BS.shape, bool) if pad_mask is None else np.array(pad_mask, bool)
    if pad_mask_BS.shape != tokens_BS.shape:
        raise ValueError(f"pad_mask is of shape {pad_mask_BS.shape}, not {tokens_BS.shape}")
    if given_mask:
        _check_mask(pad_mask_BS)
    return tokens_BS, pad_mask_BS


def check(
    tokens_BS: np.ndarray, pad_mask_BS: np.ndarray, num_latents: int, config: PerceiverARConfig
) -> None:
    """Raises ValueError where the model cannot read a prompt.

    Source of the first three messages: `PerceiverCausalSequenceModel.generate` of perceiver-io.
    """
    length = tokens_BS.shape[1]
    if not 0 < length <= config.max_seq_len:
        actual = f"has {length} tokens; shorten it, or pass its last {config.max_seq_len}"
        raise ValueError(
            f"Input sequence length out of valid range [1..{config.max_seq_len}]: "
            f"the prompt {actual if length else 'is empty'}"
        )
    if not 0 < num_latents <= config.max_latents:
        raise ValueError(f"num_latents={num_latents} out of valid range [1..{config.max_latents}]")
    least = length - config.max_prefix_len
    if num_latents < least:
        raise ValueError(
            f"For given sequence of length={length}, num_latents must "
            f"be in range [{least}..{config.max_latents}]"
        )
    for row in np.flatnonzero(pad_mask_BS.all(axis=1)):
        raise ValueError(f"row {row} of the prompt is empty")
    wrong_BS = ((tokens_BS < 0) | (tokens_BS >= config.vocab_size)) & ~pad_mask_BS
    if wrong_BS.any():
        row, column = np.argwhere(wrong_BS)[0]
        raise ValueError(
            f"token id {tokens_BS[row, column]} in row {row}, column {column} of the prompt "
            f"out of valid range [0..{config.vocab_size})"
        )


def in_bucket(
    tokens_BS: np.ndarray, pad_mask_BS: np.ndarray, num_latents: int, config: PerceiverARConfig
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens and pad mask, padded on the left to one of a few shapes, and the prefix length.

    Only the prefix varies in length, so that the last `num_latents` columns are the latents; in a
    shorter prompt some of them are pads. Pads are masked, so the text of a row does not change.
    """
    prefix_len = max(tokens_BS.shape[1] - num_latents, 0)
    bucket = min(bucket_size(prefix_len), config.max_prefix_len)
    more = ((0, 0), (bucket + num_latents - tokens_BS.shape[1], 0))
    tokens_BS = np.where(pad_mask_BS, 0, tokens_BS).astype(np.int32)  # a pad may carry any id
    return np.pad(tokens_BS, more), np.pad(pad_mask_BS, more, constant_values=True), bucket


def default_num_latents(longest: int, config: PerceiverARConfig) -> int:
    """A good number of latents for prompts of up to `longest` tokens.

    More latents predict better: 1 costs 0.1 nats on the first tokens after a long prompt. But each
    new token takes one, so 128 are left, or half of them where there are fewer than 256. The
    length matters only where it changes no row's text, or where the prefix would be too long.
    """
    most = latents_with_room(config.max_latents)
    return max(min(most, bucket_size(longest)), longest - config.max_prefix_len)


def latents_with_room(max_latents: int) -> int:
    """How many latents to use so that 128 are left for new tokens, or half of them."""
    return max(max_latents - 128, max_latents // 2, 1)


def bucket_size(length: int) -> int:
    """The next power of two, and at least 64."""
    return max(SMALLEST_BUCKET, 1 << max(length - 1, 0).bit_length())


def _check_kind(prompt):
    rows = prompt if isinstance(prompt, list | tuple) else ()
    if isinstance(prompt, str | bytes) or any(isinstance(row, str | bytes) for row in rows):
        raise ValueError(
            "a prompt is rows of token ids, not text: encode it with the tokenizer, "
            "or call generate_text of what load_pretrained returns"
        )


def _check_mask(pad_mask_BS):
    hint = "pad_mask is True at pads, where Hugging Face's attention_mask is 0"
    if pad_mask_BS.size and pad_mask_BS.all():
        raise ValueError(f"every row of the prompt is all pads: {hint}")
    for row, pads_S in enumerate(pad_mask_BS):
        if (pads_S[1:] > pads_S[:-1]).any():
            raise ValueError(f"row {row} of the prompt has pads that are not on the left: {hint}")


def _is_row(row):
    return isinstance(row, list | tuple) or np.ndim(row) == 1


def _padded(rows):
    length = max(map(len, rows), default=0)
    pads_B = np.array([length - len(row) for row in rows])
    pad_mask_BS = np.arange(length) < pads_B[:, None]
    tokens_BS = np.zeros((len(rows), length), int)
    tokens = np.array([token for row in rows for token in np.asarray(row).tolist()])
    if tokens.size:
        tokens_BS = tokens_BS.astype(tokens.dtype)
        tokens_BS[~pad_mask_BS] = tokens
    return tokens_BS, pad_mask_BS
