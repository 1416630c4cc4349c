"""Any tokenizer that Hugging Face saved as `tokenizer.json`; needs the [hub] extra."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etils import epath

from perceiver_ar_jax.tokenizers.protocol import Tokenizer, ids_with_pieces, valid_unicode

HUGGING_FACE_FILE = "tokenizer.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CONFIG_FILE = "tokenizer_config.json"
EOS_TOKENS = ("</s>", "<|endoftext|>", "<eos>", "[EOS]", "[SEP]")
PAD_TOKENS = ("<pad>", "[PAD]", "<|padding|>")


class HFTokenizer(Tokenizer):
    """`tokenizer.json` through the `tokenizers` package: ids and texts as transformers gives them.

    `eos_id` and `pad_id` are the tokens that `special_tokens_map.json` or `tokenizer_config.json`
    next to the file names, otherwise an added token with a usual name; without one `pad_id` is
    `eos_id`. Decoded text is cleaned up unless `tokenizer_config.json` is missing or declines.

    Raises:
      ValueError: the package or the path is missing, or the file is not a tokenizer or has no end
        token.
    """

    def __init__(self, path: str | Path):
        file = epath.Path(path)
        if not file.is_file():
            raise ValueError(f"no tokenizer at {path}: expected a {HUGGING_FACE_FILE}")
        self._files = {HUGGING_FACE_FILE: file.read_bytes()}
        description = _parse_json(file, self._files[HUGGING_FACE_FILE])
        named: dict[str, Any] = {}
        for beside in (file.with_name(CONFIG_FILE), file.with_name(SPECIAL_TOKENS_FILE)):
            if beside.is_file():
                self._files[beside.name] = beside.read_bytes()
                named |= _parse_json(beside, self._files[beside.name])
        self.sha256 = hashlib.sha256(self._files[HUGGING_FACE_FILE]).hexdigest()
        try:
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        except ImportError:
            raise ValueError(
                f"{path} needs the tokenizers package; install the [hub] extra: "
                "pip install 'perceiver-ar-jax[hub]'"
            ) from None
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from None
        self.vocab_size = self.model_vocab_size = 1 + max(vocabulary.values(), default=-1)
        added = {token["content"]: token["id"] for token in description.get("added_tokens") or ()}
        eos_id = _token_id(named.get("eos_token"), vocabulary, EOS_TOKENS, added)
        if eos_id is None:
            raise ValueError(f"{path} names no token to end documents with")
        pad_id = _token_id(named.get("pad_token"), vocabulary, PAD_TOKENS, added)
        self.eos_id, self.pad_id = eos_id, eos_id if pad_id is None else pad_id
        self.cleans_up = named.get("clean_up_tokenization_spaces", CONFIG_FILE in self._files)
        # One stray byte turns a whole run of <0x..> pieces into U+FFFD: see TextStream
        fallback = "ByteFallback" in json.dumps(description.get("decoder"))
        self.byte_ids = frozenset(
            i for piece, i in vocabulary.items() if fallback and _BYTE_PIECE.fullmatch(piece)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special ones added.

        Raises:
          ValueError: a character has no token, and the tokenizer none for unknown ones.
        """
        with _clear_errors():
            return self._tokenizer.encode(valid_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        texts = [valid_unicode(text) for text in texts]
        with _clear_errors():
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode_raw(self, ids: Iterable[int]) -> str:
        """Special tokens print their names."""
        return self._tokenizer.decode(ids_with_pieces(ids, self), skip_special_tokens=False)

    def save(self, folder: str | Path) -> Path:
        """Writes the file and those next to it as they were read; returns the file's path."""
        for name, data in self._files.items():
            (epath.Path(folder) / name).write_bytes(data)
        return epath.Path(folder) / HUGGING_FACE_FILE

    @functools.cached_property
    def _tokenizer(self):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(self._files[HUGGING_FACE_FILE].decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_tokenizer"}


@contextlib.contextmanager
def _clear_errors():
    try:
        yield
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"the tokenizer cannot encode a text: {error}") from None


_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def _parse_json(path: Path, data: bytes) -> dict:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(
            f"{path} ({len(data)} bytes) is not a JSON object; it begins with {data[:16]!r}"
        )
    return parsed


def _token_id(named, vocabulary: dict, usual: tuple, added: dict) -> int | None:
    """The id of the token named next to the file, otherwise of the first usual added one."""
    if isinstance(named, dict):  # an AddedToken
        named = named.get("content")
    if isinstance(named, str) and named in vocabulary:
        return vocabulary[named]
    return next((added[token] for token in usual if token in added), None)
