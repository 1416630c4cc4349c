"""Makes the quickstart's text and tokenizer, unless they exist."""

import argparse
from pathlib import Path

from perceiver_ar_jax.data.prepare.corpus import prepare_corpus
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.tokenizers import train_sentencepiece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=4096)
    arguments = parser.parse_args()
    corpus = prepare_corpus(arguments.data_dir)
    source = open_source(str(corpus), "train")
    model = arguments.data_dir / "tokenizer.model"
    texts = [source[i].text for i in range(len(source))]
    if not model.is_file():
        train_sentencepiece(texts, model, arguments.vocab_size)
    size = sum(map(len, texts))
    print(f"{len(texts):,} documents, {size:,} characters in {corpus}; tokenizer {model}")


if __name__ == "__main__":
    main()
