"""Trains a vocabulary."""

import io
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from perceiver_ar_jax.tokenizers.protocol import valid_unicode
from perceiver_ar_jax.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_MAX_LINE_BYTES = 1 << 16


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


def _training_lines(texts: Iterable[str]) -> Iterable[str]:
    """Lines without tabs and NULs: the trainer skips a line that holds one."""
    for text in texts:
        for line in valid_unicode(text).replace("\0", " ").replace("\t", "\n").split("\n"):
            if line and len(line.encode()) < _MAX_LINE_BYTES:
                yield line
