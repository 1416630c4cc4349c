"""Text to token ids and back: UTF-8 bytes, or any SentencePiece model.

Every tokenizer has `vocab_size`, `eos_id`, `pad_id`, `sha256` (of the file that defines it),
`encode(text)`, `encode_batch(texts)`, `decode(ids)` and `save(folder)`. A model may have more ids
than its tokenizer, to fill up a mesh axis: `model_vocab_size` counts them, and they print nothing.
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
from etils import epath

from perceiver_ar_jax.data import hub

SENTENCEPIECE_FILE = "spiece.model"
HUGGING_FACE_FILE = "tokenizer.json"
BYTES_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
BYTES_CLASS = "PerceiverTokenizer"
TOKENIZER_FILES = (SENTENCEPIECE_FILE, HUGGING_FACE_FILE, BYTES_FILE, SPECIAL_TOKENS_FILE)
XLNET_MODEL_BYTES = 798_011
NUM_FIRST_PIECES = 9  # enough to know XLNet's model by
_MAX_LINE_BYTES = 1 << 16  # of what a vocabulary is trained on


class ByteTokenizer:
    """UTF-8 bytes after six special ids; 262 ids, those of deepmind/language-perceiver."""

    vocab_size = model_vocab_size = 262
    pad_id = 0
    eos_id = 2
    num_special = 6  # [PAD] [BOS] [EOS] [MASK] [CLS] [SEP]
    sha256 = hashlib.sha256(b"utf-8 bytes + 6: PAD BOS EOS MASK CLS SEP").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special ones added."""
        data = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
        return (data.astype(np.int32) + self.num_special).tolist()

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Special ids print nothing; a broken character becomes U+FFFD."""
        ids = ids_with_pieces(ids, self)
        data = bytes(i - self.num_special for i in ids if i >= self.num_special)
        return data.decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> Path:
        """Writes what transformers' AutoTokenizer reads as well; returns the file's path."""
        path = epath.Path(folder) / BYTES_FILE
        path.write_text(json.dumps({"tokenizer_class": BYTES_CLASS, "model_max_length": 2048}))
        return path


class SentencePieceTokenizer:
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
        self.eos_id = _piece_id(processor, "</s>", processor.eos_id())
        if self.eos_id is None:
            raise ValueError(f"{path} has no piece </s> to end documents with")
        self.pad_id = _piece_id(processor, "<pad>", processor.pad_id())
        if self.pad_id is None:
            self.pad_id = self.eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special ones added."""
        return self._processor.encode(_valid_unicode(text))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._processor.encode([_valid_unicode(text) for text in texts], num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
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


def train_sentencepiece(
    texts: Iterable[str], path: str | Path, vocab_size: int = 4096
) -> SentencePieceTokenizer:
    """Trains a unigram model that gives every text back exactly, and writes it to `path`.

    No normalisation, bytes for unknown characters; pad 0, eos 1, unk 2. The same texts in the
    same order give the same file. The one exception: U+2581, SentencePiece's own sign for a
    blank, comes back as a blank.

    Raises:
      ValueError: the texts are too few for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_training_lines(texts)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=_MAX_LINE_BYTES,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            user_defined_symbols=["\n", "\t"],  # the trainer never sees them
            num_threads=1,  # the order of its float sums depends on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        largest = re.search(r"value <= (\d+)", str(error))
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        reason = f"no text ({error})"
        if largest:
            reason = f"the text is enough for {largest[1]}"
        elif least:
            reason = f"its characters alone need {least[1]}"
        raise ValueError(f"cannot train a vocabulary of {vocab_size}: {reason}") from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def load_tokenizer(source: str | Path, *, vocab_size: int | None = None):
    """Finds the tokenizer that `source` names, and decides which ids it gives.

    XLNet's SentencePiece model always gives the ids of Hugging Face's tokenizer.

    Args:
      source: "bytes", a SentencePiece `.model` file, a `tokenizer.json`, a folder with one of them,
        or a hub id such as "xlnet-base-cased".
      vocab_size: the model's; a tokenizer with more ids is refused, one with fewer decodes the
        model's further ids as nothing.

    Raises:
      ValueError: nothing usable is there; says what is.
    """
    tokenizer = _load(source)
    if vocab_size is None:
        return tokenizer
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {source} has {tokenizer.vocab_size} ids, the model's vocabulary only "
            f"{vocab_size}"
        )
    tokenizer.model_vocab_size = vocab_size
    return tokenizer


def _load(source: str | Path):
    if str(source) == "bytes":
        return ByteTokenizer()
    path = epath.Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if not path.exists() and hub.is_hub_id(str(source)):
        return _load_folder(epath.Path(hub.download(str(source), TOKENIZER_FILES)))
    return _load_file(path)


def _load_folder(folder: Path):
    """Where there are two files, the one whose ids are exactly Hugging Face's."""
    sentencepiece, hugging_face = folder / SENTENCEPIECE_FILE, folder / HUGGING_FACE_FILE
    if sentencepiece.is_file():
        tokenizer = _load_file(sentencepiece)
        is_exact = type(tokenizer) is not SentencePieceTokenizer
        if is_exact or not hugging_face.is_file():
            return tokenizer
    if hugging_face.is_file():
        return _load_file(hugging_face)
    if _names_byte_tokenizer(folder / BYTES_FILE):
        return ByteTokenizer()
    raise ValueError(
        f"no tokenizer in {folder}: looked for {SENTENCEPIECE_FILE}, {HUGGING_FACE_FILE} "
        f"and a {BYTES_FILE} that names {BYTES_CLASS}"
    )


def _load_file(path: Path):
    if path.name.endswith(".json"):
        from perceiver_ar_jax.data.hf_tokenizer import HFTokenizer

        return HFTokenizer(path)
    from perceiver_ar_jax.data.xlnet import XLNetTokenizer, is_xlnet

    tokenizer = SentencePieceTokenizer(path)
    return XLNetTokenizer(path) if is_xlnet(tokenizer) else tokenizer


def _names_byte_tokenizer(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        description = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(description, dict) and description.get("tokenizer_class") == BYTES_CLASS


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


def ids_with_pieces(ids: Iterable[int], tokenizer) -> list[int]:
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


def _valid_unicode(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _training_lines(texts: Iterable[str]) -> Iterable[str]:
    """Lines without tabs and NULs: the trainer skips whatever holds one."""
    for text in texts:
        for line in _valid_unicode(text).replace("\0", " ").replace("\t", "\n").split("\n"):
            if line and len(line.encode()) < _MAX_LINE_BYTES:
                yield line
