"""Which kind of documents a source's name means."""

from perceiver_ar_jax.data.config import DataConfig
from perceiver_ar_jax.data.copy_task import is_copy_task, open_copy_task
from perceiver_ar_jax.data.documents import DocumentSource
from perceiver_ar_jax.data.text_documents import open_text_documents
from perceiver_ar_jax.tokenizers import Tokenizer


def open_documents(config: DataConfig, tokenizer: Tokenizer) -> DocumentSource:
    """Opens what `config.source` and `config.split` name.

    Raises:
      ValueError: it is missing, unreadable or empty; the message says what was found.
    """
    if is_copy_task(config.source):
        return open_copy_task(config, tokenizer)
    return open_text_documents(config, tokenizer)
