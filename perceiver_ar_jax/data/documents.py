"""What the pipeline reads: documents of tokens, of any modality."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class TokenDocument(NamedTuple):
    """A document as tokens, or a piece of one."""

    tokens: np.ndarray  # (T,) int32; the closing eos included where the document ends
    ends_document: bool
    num_bytes: int  # of the original data, for bits per byte
    num_words: int = 0  # of text, separated by white space
    oddities: tuple[str, ...] = ()  # what is wrong with it, among the source's `oddities`


class DocumentSource(Protocol):
    """Random-access token documents; pickles, as it travels to the loader's workers.

    Text through a tokenizer is one (`TextDocuments`). Another modality is another class with these
    members, for `Loader` and `EvaluationBatches`.
    """

    eos_id: int  # closes a document; evaluation also begins with it
    pad_id: int
    oddities: tuple[str, ...]  # everything that can be wrong with a document; the loader counts it
    fingerprint: Mapping[str, Any]  # what determines the documents; plain JSON types

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenDocument: ...
