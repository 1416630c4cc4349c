"""Text through a tokenizer."""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from perceiver_ar_jax.data.config import DataConfig
from perceiver_ar_jax.data.documents import TokenDocument
from perceiver_ar_jax.data.read_ahead import read_in_order
from perceiver_ar_jax.data.sources import Text, TextSource, open_source, training_split
from perceiver_ar_jax.data.text_blocks import TextBlocks
from perceiver_ar_jax.tokenizers import Tokenizer

BLOCK_BYTES = (1 << 18, 1 << 16)  # the largest that gives every stream enough blocks
BLOCKS_PER_STREAM = 16
BAD_UTF8, MALFORMED, EMPTY = "bad UTF-8", "malformed line", "empty document"


class TextDocuments:
    """The token documents of a text source; see `DocumentSource`."""

    oddities = (BAD_UTF8, MALFORMED, EMPTY)
    documents_are_windows = False

    def __init__(self, source: TextSource, tokenizer: Tokenizer):
        self._source = source
        self._tokenizer = tokenizer
        self.eos_id = tokenizer.eos_id
        self.pad_id = tokenizer.pad_id

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> TokenDocument:
        return tokenize(self._source[index], self._tokenizer)

    def blocks(self, num_streams: int) -> "TextDocumentBlocks | None":
        """Blocks of a prepared dataset; None if it is too small for so many streams."""
        source = self._source
        if source.read_records is None:
            return None
        total = sum(size for _, size in source.files)
        for block_bytes in BLOCK_BYTES:
            if total >= BLOCKS_PER_STREAM * num_streams * block_bytes:
                return TextDocumentBlocks(TextBlocks(source, block_bytes), self._tokenizer)
        return None

    def in_order(self) -> Iterator[TokenDocument]:
        """All documents from the first to the last, their words counted."""
        source = self._source
        if source.read_records is None:
            texts = map(source.__getitem__, range(len(source)))
        else:
            blocks = TextBlocks(source, BLOCK_BYTES[0])
            texts = itertools.chain.from_iterable(read_in_order(blocks.read, len(blocks)))
        for text in texts:  # training, which does not need them, counts no words
            yield tokenize(text, self._tokenizer)._replace(num_words=len(text.text.split()))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What determines the documents: files and their sizes, the split, the tokenizer."""
        files = self._source.files
        return {
            "files": len(files),
            "bytes": sum(size for _, size in files),
            "files_sha256": hashlib.sha256(repr(files).encode()).hexdigest(),
            "records": len(self._source),
            "split": self._source.split,
            "tokenizer_sha256": self._tokenizer.sha256,
            "tokenizer": type(self._tokenizer).__name__,
        }


class TextDocumentBlocks:
    """Texts are read in blocks, and tokenized when a stream reaches them; see `DocumentBlocks`."""

    reads_ahead = True

    def __init__(self, blocks: TextBlocks, tokenizer: Tokenizer):
        self._blocks = blocks
        self._tokenizer = tokenizer
        self.fingerprint = {"block_bytes": blocks.block_bytes}

    def __len__(self) -> int:
        return len(self._blocks)

    def read(self, index: int) -> list[Text]:
        return self._blocks.read(index)

    def document(self, item: Text) -> TokenDocument:
        return tokenize(item, self._tokenizer)


def open_text_documents(config: DataConfig, tokenizer: Tokenizer) -> TextDocuments:
    """Opens the text that `config.source` and `config.split` name.

    Raises:
      ValueError: it is missing, unreadable or empty; the message says what was found.
    """
    split = training_split(config.source, config.split, config.eval_split)
    source = open_source(config.source, split)
    if not len(source):
        raise ValueError(f"{config.source} has no documents in {split}")
    return TextDocuments(source, tokenizer)


def tokenize(text: Text, tokenizer: Tokenizer) -> TokenDocument:
    """Encodes a text, and eos where a document ends; an empty document has no tokens.

    The last piece of a document may be white space, of which some tokenizers make no token.
    """
    ids = tokenizer.encode(text.text)
    is_whole = text.begins_document and text.ends_document
    is_empty = not ids and is_whole and not text.is_malformed
    if text.ends_document and (ids or not is_whole):
        ids.append(tokenizer.eos_id)
    found = {BAD_UTF8: not text.is_valid_utf8, MALFORMED: text.is_malformed, EMPTY: is_empty}
    return TokenDocument(
        tokens=np.asarray(ids, np.int32),
        ends_document=text.ends_document,
        num_bytes=len(text.text.encode("utf-8", errors="replace")),
        oddities=tuple(name for name, is_odd in found.items() if is_odd),
    )
