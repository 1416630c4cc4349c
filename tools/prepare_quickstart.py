"""Makes the quickstart's text, tokenizer and prompts.

    python tools/prepare_quickstart.py --data_dir=DIR [--text='mine/*.txt']

Without --text the text is prose from the documentation of Python and of the installed packages.
The prompts are the first words of held-out texts, words that occur in the text to train on.
"""

import argparse
import sys
from pathlib import Path

from perceiver_ar_jax.data.prepare.corpus import prepare_corpus
from perceiver_ar_jax.data.sources import open_source, training_split
from perceiver_ar_jax.tokenizers import train_sentencepiece

MAX_VOCAB_SIZE = 4096
CHARACTERS_PER_TOKEN = 100  # that the text has for each token of the vocabulary, at least
LEAST_CHARACTERS = 50_000
NUM_PROMPTS = 3
WORDS_OF_A_PROMPT = 5


def main() -> int:
    """Writes tokenizer.model and prompts.txt, unless they exist; says what the text is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--text", help="a file, a folder or a glob; otherwise documentation")
    arguments = parser.parse_args()
    try:
        _prepare(arguments.text or str(prepare_corpus(arguments.data_dir)), arguments.data_dir)
    except (ValueError, OSError) as error:
        print(f"prepare_quickstart.py: {error}", file=sys.stderr)
        return 2
    return 0


def _prepare(source: str, folder: Path) -> None:
    texts = _texts(source, training_split(source, "train", "validation"))
    size = sum(map(len, texts))
    if size < LEAST_CHARACTERS:
        raise ValueError(
            f"{source} has {size:,} characters to train on: {LEAST_CHARACTERS:,} are needed"
        )
    tokenizer, prompts = folder / "tokenizer.model", folder / "prompts.txt"
    if not tokenizer.is_file():
        vocab_size = min(MAX_VOCAB_SIZE, size // CHARACTERS_PER_TOKEN)
        train_sentencepiece(texts, tokenizer, vocab_size)
    if not prompts.is_file():
        lines = _prompts(_texts(source, "validation"), known={w for t in texts for w in t.split()})
        prompts.write_text("".join(f"{line}\n" for line in lines))
    print(f"{size:,} characters to train on in {source}; tokenizer {tokenizer}")


def _texts(source: str, split: str) -> list[str]:
    texts = open_source(source, split)
    return [texts[i].text for i in range(len(texts))]


def _prompts(texts: list[str], known: set[str]) -> list[str]:
    """How some of the texts begin, equally far from each other."""
    openings = [text.split()[:WORDS_OF_A_PROMPT] for text in texts]
    openings = [
        " ".join(words)
        for words in openings
        if len(words) == WORDS_OF_A_PROMPT and known.issuperset(words)
    ]
    if not openings:
        raise ValueError("the held-out text is too short for a prompt")
    return openings[:: max(1, len(openings) // NUM_PROMPTS)][:NUM_PROMPTS]


if __name__ == "__main__":
    sys.exit(main())
