"""Which documents a source's name means."""

import dataclasses

from perceiver_ar_jax.data.config import DataConfig, split_sources
from perceiver_ar_jax.data.copy_task import is_copy_task, open_copy_task
from perceiver_ar_jax.data.documents import DocumentSource, JoinedDocuments
from perceiver_ar_jax.data.text_documents import open_text_documents
from perceiver_ar_jax.tokenizers import Tokenizer


def open_documents(config: DataConfig, tokenizer: Tokenizer) -> DocumentSource:
    """Opens what `config.source` and `config.split` name; several sources one after the other.

    Raises:
      ValueError: it is missing, unreadable or empty; the message says what was found.
    """
    sources = [source for source, _ in open_weighted_documents(config, tokenizer)]
    return sources[0] if len(sources) == 1 else JoinedDocuments(sources)


def open_weighted_documents(
    config: DataConfig, tokenizer: Tokenizer
) -> list[tuple[DocumentSource, float]]:
    """Opens each source that `config.source` names; returns it with its weight.

    Raises:
      ValueError: it is missing, unreadable or empty; the message says what was found.
    """
    return [
        (_open(dataclasses.replace(config, source=source), tokenizer), weight)
        for source, weight in split_sources(config.source)
    ]


def _open(config: DataConfig, tokenizer: Tokenizer) -> DocumentSource:
    if is_copy_task(config.source):
        return open_copy_task(config, tokenizer)
    return open_text_documents(config, tokenizer)
