"""Any SentencePiece model."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from etils import epath

from perceiver_ar_jax.tokenizers.protocol import Tokenizer, ids_with_pieces, valid_unicode

SENTENCEPIECE_FILE = "spiece.model"
XLNET_MODEL_BYTES = 798_011
NUM_FIRST_PIECES = 9  # enough to recognise XLNet's model


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, its file's bytes held in memory so that it pickles and travels.

    `eos_id` is the piece `</s>`, `pad_id` the piece `<pad>`, otherwise `eos_id`.

    Raises:
      ValueError: the path is missing or is not a SentencePiece model.
    """

    def __init__(self, path: str | Path):
        self.path = epath.Path(path)
        self._model = _read_model(self.path)
        self.sha256 = hashlib.sha256(self._model).hexdigest()
        try:
            processor = self._processor
            first = range(min(processor.vocab_size(), NUM_FIRST_PIECES))
            self.first_pieces = tuple(map(processor.id_to_piece, first))
        except Exception as error:
            raise ValueError(_not_a_model(path, self._model)) from error
        self.vocab_size = self.model_vocab_size = processor.vocab_size()
        eos_id = _piece_id(processor, "</s>", processor.eos_id())
        if eos_id is None:
            raise ValueError(f"{path} has no piece </s> to end documents with")
        pad_id = _piece_id(processor, "<pad>", processor.pad_id())
        self.eos_id, self.pad_id = eos_id, eos_id if pad_id is None else pad_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special ones added."""
        return self._processor.encode(valid_unicode(text))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._processor.encode([valid_unicode(text) for text in texts], num_threads=1)

    def decode_raw(self, ids: Iterable[int]) -> str:
        """Control pieces such as `</s>` print nothing."""
        return self._processor.decode(ids_with_pieces(ids, self))

    def piece(self, token_id: int) -> str:
        """How the model spells a token."""
        return self._processor.id_to_piece(token_id)

    def save(self, folder: str | Path) -> Path:
        """Writes the model as it was read; returns the file's path."""
        path = epath.Path(folder) / SENTENCEPIECE_FILE
        path.write_bytes(self._model)
        return path

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self._model)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_processor"}


def _read_model(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f'no tokenizer at {path}: expected a SentencePiece .model file or "bytes"')
    data = path.read_bytes()
    if not data.startswith(b"\n"):  # the first field of every SentencePiece model: its pieces
        raise ValueError(_not_a_model(path, data))
    return data


def _not_a_model(path: str | Path, data: bytes) -> str:
    start = data[:200].lstrip().lower()
    if not data:
        what = "is empty"
    elif start.startswith(b"version https://git-lfs"):
        size = next((line[5:] for line in data.decode().splitlines() if line[:5] == "size "), "?")
        what = f"is a Git LFS pointer to a file of {size} bytes: run `git lfs pull`"
    elif start.startswith((b"<!doctype", b"<html")):
        what = "is an HTML page: the download went wrong"
    else:
        what = f"begins with {data[:16]!r}"
    return (
        f"{path} ({len(data)} bytes) is not a SentencePiece model, it {what} "
        f"(XLNet's spiece.model has {XLNET_MODEL_BYTES} bytes)"
    )


def _piece_id(processor, piece: str, default: int) -> int | None:
    """The id of `piece`; if there is none `default`, or None where that is negative."""
    found = processor.piece_to_id(piece)
    if processor.id_to_piece(found) == piece:
        return found
    return default if default >= 0 else None
