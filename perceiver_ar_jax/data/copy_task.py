"""The copy task: random bytes, and then the same bytes again, mirrored or in their order."""

import re
from typing import Any

import numpy as np

from perceiver_ar_jax.data.config import DataConfig
from perceiver_ar_jax.data.documents import TokenDocument
from perceiver_ar_jax.tokenizers import ByteTokenizer, Tokenizer

ORDERS = ("mirror", "repeat")
NUM_TRAINING = 2**30  # more than any run reads
VALIDATION_POSITIONS = 2**15  # about so many in all validation documents, but at least 8 documents

_NAME = re.compile(rf"({'|'.join(ORDERS)}):(.*)")


class CopyTask:
    """Random-access documents of n + 1 tokens, the windows of n positions; see `DocumentSource`.

    A document is n/2 random bytes, their copy, and eos. The loss counts the copy from its second
    token on, and eos: n/2 targets, all predicted from positions inside the copy. So with n/2
    latents the prefix is exactly the bytes to be copied, and the latents are their copy. In the
    mirrored copy the byte to predict at position p stood at n - 2 - p, so that distances
    are all even numbers up to n - 2; in a repeated one it is always n/2 - 1 positions back.

    Documents are a function of their split and index alone. `mirror` is the task of the paper
    (arXiv 2202.07765, section 5.1.1), whose sequences begin with a marker.
    """

    oddities = ()
    documents_are_windows = True
    eos_id, pad_id = ByteTokenizer.eos_id, ByteTokenizer.pad_id

    def __init__(self, order: str, positions: int, split: str):
        self._order, self._positions, self._split = order, positions, split
        num_validation = max(8, VALIDATION_POSITIONS // positions)
        self._length = NUM_TRAINING if split == "train" else num_validation

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> TokenDocument:
        half = self._positions // 2
        # Raw numbers of Philox, which every version of NumPy gives alike.
        generator = np.random.Philox(key=int(self._split == "train"), counter=[0, 0, 0, index])
        data = generator.random_raw(-(-half // 8)).astype("<u8").view(np.uint8)[:half]
        source = data.astype(np.int32) + ByteTokenizer.num_special
        copy = source[::-1] if self._order == "mirror" else source
        tokens = np.concatenate([source, copy, np.array([self.eos_id], np.int32)])
        counted = np.arange(len(tokens)) > half
        return TokenDocument(tokens, ends_document=True, num_bytes=half - 1, counted=counted)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What determines the documents."""
        return {
            "task": self._order,
            "positions": self._positions,
            "split": self._split,
            "records": len(self),
            "tokenizer_sha256": ByteTokenizer.sha256,
        }


def is_copy_task(source: str) -> bool:
    """Whether a source's name is that of a copy task, "mirror:…" or "repeat:…"."""
    return _NAME.fullmatch(source) is not None


def open_copy_task(config: DataConfig, tokenizer: Tokenizer) -> CopyTask:
    """The task that `config.source` names, such as "mirror:128" for windows of 128 positions.

    Raises:
      ValueError: the number, the split, the length of windows or the tokenizer does not fit.
    """
    order, number = _NAME.fullmatch(config.source).groups()
    positions = int(number) if re.fullmatch("[0-9]{1,8}", number) else 0
    if positions < 4 or positions % 2:
        raise ValueError(
            f"{config.source}: the positions of a copy task must be an even number of at least 4, "
            f"such as {order}:128"
        )
    if config.split not in ("train", "validation"):
        raise ValueError(f"{config.source} has the splits train and validation, not {config.split}")
    if positions > config.max_seq_len:
        raise ValueError(
            f"{config.source} needs windows of {positions:,} positions; the model reads at most "
            f"{config.max_seq_len:,} (max_seq_len)"
        )
    if not isinstance(tokenizer, ByteTokenizer):
        raise ValueError(f"{config.source} is made of bytes: its tokenizer must be bytes")
    return CopyTask(order, positions, config.split)
