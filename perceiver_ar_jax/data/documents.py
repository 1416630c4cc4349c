"""What the pipeline reads: documents of tokens, of any modality."""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class TokenDocument(NamedTuple):
    """A document as tokens, or a piece of one."""

    tokens: np.ndarray  # (T,) int32; the closing eos included where the document ends
    ends_document: bool
    num_bytes: int  # of the original data, for bits per byte
    num_words: int = 0  # of text, separated by white space; counted by `in_order` alone
    oddities: tuple[str, ...] = ()  # what is wrong with it, among the source's `oddities`
    counted: np.ndarray | None = None  # (T,) bool, which tokens the loss counts; None: all


class DocumentSource(Protocol):
    """Random-access token documents; pickles, as it travels to the loader's workers.

    Text through a tokenizer is one (`TextDocuments`). Another modality is another class with these
    members, for `Loader` and `EvaluationBatches`.
    """

    eos_id: int  # closes a document; evaluation also begins with it
    pad_id: int
    oddities: tuple[str, ...]  # everything that can be wrong with a document; the loader counts it
    documents_are_windows: bool  # a window is one document, or its beginning; otherwise joined
    fingerprint: Mapping[str, Any]  # what determines the documents; plain JSON types

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenDocument: ...


class JoinedDocuments:
    """The documents of several sources, one source after the other.

    Raises:
      ValueError: the documents of one are windows, which are evaluated alone.
    """

    documents_are_windows = False

    def __init__(self, sources: Sequence[DocumentSource]):
        if any(source.documents_are_windows for source in sources):
            raise ValueError("a copy task cannot be evaluated together with other sources")
        self._sources = sources
        self._ends = list(itertools.accumulate(map(len, sources)))
        self.eos_id, self.pad_id = sources[0].eos_id, sources[0].pad_id
        self.oddities = oddities_of(sources)
        self.fingerprint = {"sources": [dict(source.fingerprint) for source in sources]}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> TokenDocument:
        number = bisect.bisect_right(self._ends, index)
        source = self._sources[number]
        return source[index - self._ends[number] + len(source)]

    def in_order(self) -> Iterator[TokenDocument]:
        """All documents from the first to the last."""
        return itertools.chain.from_iterable(map(in_order, self._sources))


class DocumentBlocks(Protocol):
    """Documents in blocks that are read at once; pickles.

    A `DocumentSource` that reads consecutive documents faster than single ones has a method
    `blocks(num_streams)` that returns this, or None where single ones are better for so many
    streams, and a method `in_order()` that gives all of its documents.
    """

    fingerprint: Mapping[str, Any]  # what determines the blocks
    reads_ahead: bool  # whether threads should read them in advance

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sequence[Any]:
        """One item for each document of a block; called by several threads."""

    def document(self, item: Any) -> TokenDocument:
        """The document of an item."""


class SingleDocuments:
    """Blocks of one document each."""

    fingerprint: Mapping[str, Any] = {}
    reads_ahead = False

    def __init__(self, source: DocumentSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Sequence[int]:
        return [index]

    def document(self, item: int) -> TokenDocument:
        return self._source[item]


def blocks_of(source: DocumentSource, num_streams: int) -> DocumentBlocks:
    """The blocks that so many streams read."""
    make = getattr(source, "blocks", None)
    return (make and make(num_streams)) or SingleDocuments(source)


def oddities_of(sources: Sequence[Any]) -> tuple[str, ...]:
    """Everything that can be wrong with a document of any source, or of its ordered blocks."""
    return tuple(dict.fromkeys(name for source in sources for name in source.oddities))


def in_order(source: DocumentSource) -> Iterator[TokenDocument]:
    """All documents from the first to the last."""
    make = getattr(source, "in_order", None)
    return make() if make else map(source.__getitem__, range(len(source)))
