"""Trains a SentencePiece vocabulary on your own text; it gives every text back exactly.

Example:
  perceiver-ar tokenizer mine/*.txt --vocab_size=2048 --output=mine.model
  perceiver-ar train --config=text_cpu --config.data.source="mine/*.txt" \\
    --config.data.tokenizer=mine.model --config.model.vocab_size=2048

The same text in the same order gives the same file. Without a tokenizer, models read bytes, which
suits texts below a few megabytes.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import argparse
from pathlib import Path

from perceiver_ar_jax.command_line import Parser


def main(argv: list[str]) -> int:
    """Writes the vocabulary, says what it does with the text; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.output.exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output} exists; --overwrite replaces it")
    from perceiver_ar_jax.data.sources import open_source
    from perceiver_ar_jax.tokenizers import train_sentencepiece

    texts = []
    for source in arguments.files:
        found = open_source(source, arguments.split)
        texts += [found[i].text for i in range(len(found))]
    tokenizer = train_sentencepiece(texts, arguments.output, arguments.vocab_size)
    num_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    print(
        f"{arguments.output}: {tokenizer.vocab_size:,} ids; the text's {num_bytes:,} bytes are "
        f"{num_tokens:,} tokens, {num_bytes / max(num_tokens, 1):.2f} bytes each"
    )
    return 0


def _parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add
    add("files", "files, folders or quoted globs of UTF-8 text or JSONL", nargs="+")
    add("--vocab_size", "ids; a megabyte of text is enough for a few thousand", type=_size,
        default=4096)  # fmt: skip
    add("--output", "the file to write", type=Path, default=Path("tokenizer.model"))
    add("--split", "what of each is read, such as train[:98%%]", default="train")
    add("--overwrite", "replace the file of --output", action="store_true")
    return parser


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ids")
    return int(text)
