"""XLNet's tokenizer from `spiece.model`, id for id what Hugging Face's fast tokenizer gives."""

import functools
import math
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from perceiver_ar_jax.tokenizers.protocol import ids_with_pieces
from perceiver_ar_jax.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

SPECIAL_PIECES = (  # their places in the model are their ids
    "<unk>",
    "<s>",
    "</s>",
    "<cls>",
    "<sep>",
    "<pad>",
    "<mask>",
    "<eod>",
    "<eop>",
)
UNK_ID = SPECIAL_PIECES.index("<unk>")
MASK_ID = SPECIAL_PIECES.index("<mask>")
CACHED_WORDS = 1 << 16  # at least so many of the words met last


class XLNetTokenizer(SentencePieceTokenizer):
    """The ids and texts of `XLNetTokenizerFast(add_special_tokens=False)`, without transformers.

    SentencePiece sums a text's scores in float32, Hugging Face a word's in float64, and near ties
    fall differently: so only the model's pieces and character map are SentencePiece's here.

    Args:
      path: XLNet's `spiece.model`.
      split_special_tokens: for untrusted text. `</s>` and other special pieces are then encoded as
        ordinary text, so that no text yields the id of a special piece (except `<unk>`).

    Raises:
      ValueError: the path is missing or is not XLNet's model.
    """

    cleans_up = True  # `decode` is `clean_up` of `decode_raw`

    def __init__(self, path: str | Path, *, split_special_tokens: bool = False):
        super().__init__(path)
        self.split_special_tokens = split_special_tokens
        if not is_xlnet(self):
            first = " ".join(self.first_pieces)
            raise ValueError(f"{path} is not XLNet's model: its pieces begin with {first}")

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no special ones added."""
        if self.split_special_tokens:
            return self._encode_words(self._normalize(text))
        ids = []
        for part in _SPECIAL_BUT_MASK.split(text):
            if part in _SPECIAL_IDS:
                ids.append(_SPECIAL_IDS[part])
            else:
                ids.extend(self._encode_with_masks(self._normalize(part)))
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def decode_raw(self, ids: Iterable[int]) -> str:
        """The pieces joined, special ones by their names, without the first blank."""
        pieces = self._unigram.pieces
        text = "".join(pieces[i] for i in ids_with_pieces(ids, self))
        return text.replace("▁", " ").removeprefix(" ")

    def _normalize(self, text: str) -> str:
        text = text.replace("``", '"').replace("''", '"').translate(self._characters)
        return _BLANKS.sub(" ", text)

    def _encode_with_masks(self, text: str) -> list[int]:
        """`<mask>` alone is looked for in normalised text, and takes the blanks before it."""
        *before, last = text.split("<mask>")
        ids = []
        for part in before:
            ids.extend(self._encode_words(part.rstrip(_BLANKS_AFTER_NORMALIZATION)))
            ids.append(MASK_ID)
        return ids + self._encode_words(last)

    def _encode_words(self, text: str) -> list[int]:
        if not text:
            return []
        words = text.removeprefix(" ").split(" ")
        return np.frombuffer(b"".join(map(self._words.__getitem__, words)), np.int32).tolist()

    @functools.cached_property
    def _words(self) -> "_Words":
        return _Words(self._unigram)

    @functools.cached_property
    def _unigram(self) -> "_Unigram":
        return _Unigram(self._processor, with_special=not self.split_special_tokens)

    @functools.cached_property
    def _characters(self) -> "_Characters":
        return _Characters(self._model)

    def __getstate__(self):
        lazy = ("_words", "_unigram", "_characters")
        return {k: v for k, v in super().__getstate__().items() if k not in lazy}


def is_xlnet(tokenizer: SentencePieceTokenizer) -> bool:
    """Whether a SentencePiece model is XLNet's, by its first pieces."""
    return tokenizer.first_pieces == SPECIAL_PIECES


_SPECIAL_IDS = {piece: i for i, piece in enumerate(SPECIAL_PIECES) if i != MASK_ID}
_SPECIAL_BUT_MASK = re.compile(f"({'|'.join(_SPECIAL_IDS)})")
_BLANKS = re.compile(" {2,}")
_BLANKS_AFTER_NORMALIZATION = " \x85"  # the only white space that the character map leaves


class _Words(dict):
    """Word to its ids, as bytes of int32: joining bytes is faster than joining tuples.

    When the words are too many, they become the older ones; of these, those that are met again
    come back, and the others go when it happens next.
    """

    def __init__(self, unigram: "_Unigram"):
        self._encode = unigram.encode_word
        self._older: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        if len(self) >= CACHED_WORDS:
            self._older = dict(self)
            self.clear()
        ids = self._older.get(word)
        if ids is None:
            ids = np.array(self._encode(word), np.int32).tobytes()
        self[word] = ids
        return ids


class _Unigram:
    """Words to ids: the path through the pieces with the highest sum of log-probabilities.

    Sums run in float64 from the word's start, ties keep the earlier start: as in the Unigram
    model of Hugging Face's tokenizers.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, *, with_special: bool):
        ids = range(processor.vocab_size())
        self.pieces = [processor.id_to_piece(i) for i in ids]
        scores = [_score(processor, i) for i in ids]
        usable = ids if with_special else ids[len(SPECIAL_PIECES) :]
        pieces = {self.pieces[i]: (scores[i], i) for i in usable}
        self._unknown = (min(scores) - 10, UNK_ID)
        beginnings = {piece[:end] for piece in pieces for end in range(1, len(piece))}
        self._scored = pieces | {  # beginnings tell the search below how far it pays to look
            text: (-math.inf, UNK_ID) if len(text) > 1 else self._unknown
            for text in beginnings - pieces.keys()
        }

    def encode_word(self, word: str) -> list[int]:
        """The ids of a word; its leading "▁" is implied."""
        word = "▁" + word
        best = [0.0] + [-math.inf] * len(word)  # by end: score of the best path to there,
        last = [(0, UNK_ID)] * (len(word) + 1)  # and the start and id of its last piece
        for start in range(len(word)):
            for end in range(start + 1, len(word) + 1):
                found = self._scored.get(word[start:end])
                if found is None:
                    if end > start + 1:
                        break
                    found = self._unknown
                score = best[start] + found[0]
                if score > best[end]:
                    best[end] = score
                    last[end] = (start, found[1])
        return _backtrack(last)


def _score(processor: sentencepiece.SentencePieceProcessor, i: int) -> float:
    """XLNet's own twist: "2010," is "2010" and ",", so pieces like "0," all but vanish."""
    piece = processor.id_to_piece(i)
    digit_and_comma = piece.endswith(",") and piece[-2:-1].isdigit()
    return processor.get_score(i) - 100 * digit_and_comma


def _backtrack(last: list[tuple[int, int]]) -> list[int]:
    """The pieces' ids in order; neighbouring unknown ones become one."""
    ids: list[int] = []
    end = len(last) - 1
    while end > 0:
        end, i = last[end]
        if i != UNK_ID or ids[-1:] != [UNK_ID]:
            ids.append(i)
    return ids[::-1]


class _Characters(dict):
    """Code point to normalised text, for `str.translate`; filled as characters are met.

    NFKD, marks dropped, then the model's map (nmt_nfkc) one character at a time: Hugging Face
    never lets the map join several.
    """

    def __init__(self, model: bytes):
        self._normalizer = sentencepiece.SentencePieceNormalizer(
            model_proto=model,
            add_dummy_prefix=False,
            escape_whitespaces=False,
            remove_extra_whitespaces=False,
        )

    def __missing__(self, code: int) -> str:
        characters = chr(code).encode("utf-8", errors="replace").decode("utf-8")
        if not any(code in block for block in _NEWER_THAN_UNICODE_9):
            decomposed = unicodedata.normalize("NFKD", characters)
            characters = "".join(filter(_is_not_mark, decomposed))
        self[code] = "".join(map(self._normalizer.normalize, characters))
        return self[code]


def _is_not_mark(character: str) -> bool:
    # U+1CF2 and U+1CF3 were marks in Unicode 9
    return unicodedata.category(character)[0] != "M" and character not in "\u1cf2\u1cf3"


def _ranges(text: str) -> list[range]:
    """Parses "7fd 897-8d3": code points and inclusive ranges of them."""
    bounds = [[int(bound, 16) for bound in item.split("-")] for item in text.split()]
    return [range(bound[0], bound[-1] + 1) for bound in bounds]


# Marks and compositions (and neighbours that are neither) that Unicode 10 to 18 added. Hugging
# Face's tables are those of Unicode 9 and leave them as they are.
_NEWER_THAN_UNICODE_9 = _ranges(
    """558 58b-58c 5c8-5c9 7fd 897-8d3 9fe afa-aff b53-b55 c04-c3c cf3-d00 d3b-d3c d81 eba ece 1715
    180f 1abf-1af0 1cf7 1df6-1dfa 209d-209f a7f1-a7f4 a82c a8ff 105c9-105e4 10783 107a2
    107a5 107bb-107bf 10d24-10f85 11070-11074 110c2 11145-11146 111c9 111ce-111cf 11241 1133b
    11383-113e2 1145e 1182c-11b67 11d31-1612f 16d68-16f4f 16f7f-16f87 16fe4-1b126 1ccd6-1d128
    1d250-1d281 1d6a6 1df95-1dfff 1e030-1e6f5 1f16c 1fbf0-1fbf9"""
)
