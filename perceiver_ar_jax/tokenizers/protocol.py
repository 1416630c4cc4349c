"""What every tokenizer has."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from perceiver_ar_jax.tokenizers.clean_up import clean_up


class Tokenizer(Protocol):
    """Text to token ids and back; pickles, as it travels to the loader's workers.

    A tokenizer inherits from this class and gives it the attributes without a value, `encode`,
    `decode_raw` and `save`.
    """

    vocab_size: int
    model_vocab_size: int  # of the model; ids from `vocab_size` on fill a mesh axis, print nothing
    eos_id: int  # closes a document
    pad_id: int
    sha256: str  # of the file that defines the tokenizer
    cleans_up: bool = False  # `decode` removes the blanks before English punctuation
    byte_ids: frozenset[int] = frozenset()  # a run of these ids decodes only as a whole

    def __call__(self, text: str | Iterable[str]) -> list[int] | list[list[int]]:
        """The ids of a text, or of each of several."""
        return self.encode(text) if isinstance(text, str) else self.encode_batch(text)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special ones added."""
        ...

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some of the model's ids.

        Raises:
          ValueError: an id is not the model's.
        """
        text = self.decode_raw(ids)
        return clean_up(text) if self.cleans_up else text

    def decode_raw(self, ids: Iterable[int]) -> str:
        """`decode` before the clean-up."""
        ...

    def save(self, folder: str | Path) -> Path:
        """Writes what `load_tokenizer(folder)` reads; returns the file's path."""
        ...


def ids_with_pieces(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """The ids without those that the model has beyond its tokenizer's.

    Raises:
      ValueError: an id is not the model's either.
    """
    ids = [int(i) for i in ids]
    for place, i in enumerate(ids):
        if not 0 <= i < tokenizer.model_vocab_size:
            raise ValueError(
                f"token id {i} at position {place} is outside 0..{tokenizer.model_vocab_size - 1}"
            )
    return [i for i in ids if i < tokenizer.vocab_size]


def valid_unicode(text: str) -> str:
    """Lone surrogates, which no encoding has, become question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
