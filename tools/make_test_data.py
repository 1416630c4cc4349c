"""Makes the data that tests read, on a machine without the collection in ../shared/data.

    python tools/make_test_data.py --output runs/test-data        (or: make test-data)

    c4/*.jsonl           pages: {"text", "url", "timestamp"}        from the installed documentation
    books/*.txt          long plain texts                           likewise
    xlnet/spiece.model   XLNet's tokenizer                          from the Hugging Face hub, or
                         a stand-in trained like it, where the hub cannot be reached

Tests find the folder by themselves (tests/conftest.py); PERCEIVER_AR_DATA names another one. With
the stand-in, the few tests that know XLNet's own ids are skipped, and say so.
"""

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import sentencepiece

from perceiver_ar_jax.data.prepare.corpus import collect_documents, documentation
from perceiver_ar_jax.tokenizers import hub

PAGE_CHARS, NUM_PAGES = 1200, 1500
BOOK_CHARS = 300_000
# As in XLNet's README; the vocabulary is smaller where the text is not enough for more.
XLNET_TRAINING = {
    "model_type": "unigram",
    "vocab_size": 32_000,
    "hard_vocab_limit": False,
    "character_coverage": 0.99995,
    "control_symbols": "<cls>,<sep>,<pad>,<mask>,<eod>",
    "user_defined_symbols": ["<eop>", ".", "(", ")", '"', "-", "–", "£", "€"],
    "num_threads": 1,
    "minloglevel": 2,
}


def make_test_data(folder: Path) -> None:
    """Writes the folder; it appears complete or not at all."""
    partial = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("c4", "books", "xlnet"):
        (partial / name).mkdir(parents=True)
    documents = collect_documents(documentation())
    paragraphs = [part for document in documents for part in document.text.split("\n\n")]
    pages = [page for document in documents for page in pages_of(document.text)][:NUM_PAGES]
    with (partial / "c4" / "pages.jsonl").open("w") as file:
        for i, page in enumerate(pages):
            line = {"text": page, "url": f"pydoc:{i}", "timestamp": "1970-01-01T00:00:00Z"}
            file.write(json.dumps(line) + "\n")
    book = "\n\n".join(paragraphs)[-BOOK_CHARS:]
    (partial / "books" / "documentation.txt").write_text(book)
    model = partial / "xlnet" / "spiece.model"
    try:
        shutil.copyfile(hub.download("xlnet-base-cased", [model.name]) / model.name, model)
    except ValueError:
        print(f"no hub: {model} is a stand-in for XLNet's tokenizer", file=sys.stderr)
        model.write_bytes(train_like_xlnet(paragraphs))
    partial.rename(folder)


def pages_of(text: str) -> list[str]:
    """Paragraphs joined until they fill a page."""
    pages = [""]
    for paragraph in text.split("\n\n"):
        if len(pages[-1]) > PAGE_CHARS:
            pages.append("")
        pages[-1] += paragraph + "\n"
    return pages


def train_like_xlnet(texts: list[str]) -> bytes:
    """A SentencePiece model with XLNet's special pieces, and its way with characters and blanks."""
    lines = (line for text in texts for line in text.replace("\0", "").split("\n") if line)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **XLNET_TRAINING
    )
    return model.getvalue()


def main() -> None:
    """Makes the folder, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output
    if not folder.is_dir():
        make_test_data(folder)
    print(folder)


if __name__ == "__main__":
    main()
