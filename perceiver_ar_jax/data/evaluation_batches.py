"""A split as overlapping windows: every token is predicted once, with long context."""

import itertools
from collections.abc import Iterator

import numpy as np

from perceiver_ar_jax.data.config import DataConfig
from perceiver_ar_jax.data.documents import DocumentSource, in_order
from perceiver_ar_jax.data.opening import open_documents
from perceiver_ar_jax.data.rows import pad_rows, write_window
from perceiver_ar_jax.tokenizers import Tokenizer


class EvaluationBatches:
    """One pass over a split each time it is iterated over; made by `evaluation_batches`.

    Batches are like those of the loader; `weights` is 1 only at the targets that no earlier window
    has predicted, the last `stride` of a window, and of those at what the documents count. Every
    process has `len` batches.

    Attributes:
      stride: how many targets a window adds, at most the number of its latents.
      prefix_len: the positions of a window before its latents.
      stream: (T,) int32, all tokens, an eos before them.
      num_tokens: targets with weight 1, over all processes: every token of the text, and the eos of
        each document, or what the documents count.
      num_bytes: the UTF-8 bytes of the text; nats / log(2) / num_bytes are bits per byte.
      num_words: its words, separated by white space.
      oddities: documents counted by what is wrong with them.
    """

    def __init__(
        self,
        config: DataConfig,
        documents: DocumentSource,
        *,
        num_latents: int,
        stride: int | None = None,
        process_index: int,
        rows: int,
    ):
        self._config = config
        self._pad_id = documents.pad_id
        self.stride = num_latents if stride is None else stride
        self.prefix_len = config.max_seq_len - num_latents
        self._first_row = config.batch_size * process_index
        self._rows = rows
        self._join(documents)
        windows = self._windows_in_documents if documents.documents_are_windows else self._windows
        self._windows_W3 = np.array(list(windows()), np.int64)
        self.num_tokens = int(
            sum(self._counted[a + 1 : b + 1].sum() for _, a, b in self._windows_W3)
        )

    def __len__(self) -> int:
        return -(-len(self._windows_W3) // self._rows)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for step in range(len(self)):
            rows = pad_rows(
                self._config.batch_size,
                self._config.max_seq_len,
                pad_id=self._pad_id,
                with_segment_ids=self._config.respect_documents,
            )
            for row, window in enumerate(self._windows_of(step)):
                self._write_window(rows, row, *window)
            yield rows

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the targets that batch `step` counts are in the text, in the order of its rows.

        Returns:
          How many tokens of its document precede each target; how many tokens the model reads to
          predict it, those of its document only if documents are respected; and how many of these
          are prefix.
        """
        parts = [np.zeros((3, 0), int)]
        for first, begin, end in self._windows_of(step):
            targets = begin + 1 + np.flatnonzero(self._counted[begin + 1 : end + 1])
            visible = np.full(len(targets), max(first, end - self._config.max_seq_len))
            if self._config.respect_documents:
                visible = np.maximum(visible, self._document_start(targets - 1))
            first_latent = end - (self._config.max_seq_len - self.prefix_len)
            position = targets - self._document_start(targets)
            prefix = np.maximum(0, first_latent - visible)
            parts.append(np.array([position, targets - visible, prefix]))
        positions, contexts, prefixes = np.concatenate(parts, axis=1)
        return positions, contexts, prefixes

    def _windows_of(self, step: int) -> np.ndarray:
        first = step * self._rows + self._first_row
        return self._windows_W3[first : first + self._config.batch_size]

    def _document_start(self, places: np.ndarray) -> np.ndarray:
        documents = np.searchsorted(self._document_starts, places, side="right") - 1
        return self._document_starts[documents]

    def _join(self, documents: DocumentSource) -> None:
        """All tokens, after one eos so that the first is predicted too, as in training."""
        parts = [np.array([documents.eos_id], np.int32)]
        counted = [np.zeros(1, bool)]
        starts = [0, 1]
        length = 1
        self.oddities = dict.fromkeys(documents.oddities, 0)
        self.num_bytes = self.num_words = 0
        for document in in_order(documents):
            all_count = np.ones(len(document.tokens), bool)
            parts.append(document.tokens)
            counted.append(all_count if document.counted is None else document.counted)
            length += len(document.tokens)
            self.num_bytes += document.num_bytes
            self.num_words += document.num_words
            for name in document.oddities:
                self.oddities[name] += 1
            if document.ends_document:
                starts.append(length)
        if length == 1:
            raise ValueError(f"{self._config.source} has no text in {self._config.split}")
        self.stream, self._counted = np.concatenate(parts), np.concatenate(counted)
        self._document_starts = np.array(starts)

    def _windows(self) -> Iterator[tuple[int, int, int]]:
        """What may be read, from its first token, and the begin and end of the tokens to read last.

        Window n predicts what follows the `stride` tokens from n * stride; the last window ends
        with the stream.
        """
        length = len(self.stream) - 1
        for begin in range(0, length, self.stride):
            yield 0, begin, min(begin + self.stride, length)

    def _windows_in_documents(self) -> Iterator[tuple[int, int, int]]:
        """The same of each document alone, from its end, where anything counts."""
        for first, stop in itertools.pairwise(self._document_starts[1:]):
            for end in range(stop - 1, first, -self.stride):
                begin = max(first, end - self.stride)
                if self._counted[begin + 1 : end + 1].any():
                    yield first, begin, end

    def _write_window(
        self, rows: dict[str, np.ndarray], row: int, first: int, begin: int, end: int
    ) -> None:
        start = max(first, end - self._config.max_seq_len)
        documents = np.searchsorted(self._document_starts, np.arange(start, end), side="right")
        counted = self._counted[start + 1 : end + 1].copy()
        counted[: begin - start] = False  # an earlier window counts them
        write_window(
            rows,
            row,
            self.stream[start : end + 1],
            documents - documents[0] + 1,
            counted=counted,
        )


def evaluation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    num_latents: int,
    stride: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> EvaluationBatches:
    """Reads and tokenises the whole split once, and cuts it into batches without shuffling.

    The documents, joined with eos, are one stream. Windows of `max_seq_len` tokens advance by
    `stride`, by default `num_latents`, so that each token is predicted once, by one of the last
    `stride` latents, with at least max_seq_len - stride tokens before it (except at the beginning
    of the stream). The last batch is filled with rows of pads. Tokens are held in memory, 4 bytes
    each: use a slice of a large split. Documents that are windows are cut one by one, from their
    ends.

    Raises:
      ValueError: the data is missing or without text, or num_latents or stride is out of range.
    """
    if not 1 <= num_latents <= config.max_seq_len:
        raise ValueError(f"num_latents={num_latents} out of valid range [1..{config.max_seq_len}]")
    if stride is not None and not 1 <= stride <= num_latents:
        raise ValueError(f"stride={stride} out of valid range [1..{num_latents}], the latents")
    return EvaluationBatches(
        config,
        open_documents(config, tokenizer),
        num_latents=num_latents,
        stride=stride,
        process_index=process_index,
        rows=config.batch_size * process_count,
    )
