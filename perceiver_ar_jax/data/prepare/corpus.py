"""An English corpus from what every installation has: the documentation of Python packages.

The full sentences among the topics of `pydoc`, docstrings, other long strings and READMEs of the
standard library and of our runtime dependencies; parsed, never imported. The same installed
versions give the same corpus; it is meant for the quickstart and for tests, not for quoted results.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from perceiver_ar_jax.data.prepare.tfds_writer import Document, prepared_directory, write_dataset

NAME, CONFIG, VERSION = "python_docs", "en", "2.0.0"
# fmt: off
DISTRIBUTIONS = (
    "absl-py", "etils", "flax", "fsspec", "grain", "jax", "jaxlib", "ml_collections", "numpy",
    "optax", "orbax-checkpoint", "pip", "pygments", "rich", "safetensors", "scipy", "sentencepiece",
    "setuptools", "tensorboardX", "tensorflow-datasets", "treescope",
)
# fmt: on
VALIDATION_SHARE = 0.05

_MIN_STRING_CHARS = 80
_MIN_SENTENCE_CHARS = 100  # of a text that is a single one
_MIN_DOCUMENT_CHARS = 200
_MAX_DOCUMENT_CHARS = 20_000
_SHINGLE_WORDS = 8
# Lists, fields, headings, directives and doctests.
_NOT_RUNNING_TEXT = re.compile(
    r"(?m)^\s*(?:[-*+•|]\s|\d+[.)]\s|\.\. |[-=~^*+#]{3,}|[\w*`]+(?: \([^)]*\))?: |\w+:$)|>>>"
)
_ABBREVIATIONS = {"e.g.": "for example", "i.e.": "that is", "etc.": "and so on"}
_ENDS_A_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
_WORD_OF_A_SENTENCE = re.compile(
    r"\(?(?:[A-Z]?[a-z]+(?:[-'][A-Z]?[a-z]+)*|[AI]|[A-Z]{2,5}s?)\)?[,;:.!?]?\)?|--?"
)
_COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by can for from has have if in is it its may not of on or that the "
        "then there these they this to used using was when which will with you",
    )
)


def prepare_corpus(data_dir: str | Path) -> Path:
    """Makes the corpus under `data_dir`, unless it exists.

    Returns:
      The prepared TFDS directory (C4's features, ArrayRecord, splits train and validation),
      which `tfds.builder_from_directory` reads.
    """
    directory = prepared_directory(data_dir, NAME, CONFIG, VERSION)
    if not (directory / "dataset_info.json").is_file():
        write_dataset(
            split_documents(collect_documents(documentation())),
            name=NAME,
            config=CONFIG,
            version=VERSION,
            data_dir=data_dir,
            num_shards=2,
        )
    return directory


def collect_documents(strings_by_name: Iterable[tuple[str, list[str]]]) -> list[Document]:
    """Documents made of the prose of each string, without near-duplicates."""
    seen: set[bytes] = set()
    documents = []
    for name, strings in strings_by_name:
        texts = [text for text in map(prose_of, strings) if text and _is_new(text, seen)]
        for part, text in enumerate(_joined(texts)):
            documents.append(Document(text=text, url=f"pydoc:{name}#{part}"))
    return documents


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Holds out files for validation in the order of a hash of their names, up to 3 %."""
    by_file: dict[str, list[Document]] = {}
    for document in documents:
        by_file.setdefault(document.url.split("#")[0], []).append(document)
    wanted = VALIDATION_SHARE * sum(len(document.text) for document in documents)
    held_out: set[str] = set()
    for file in sorted(by_file, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = sum(len(document.text) for document in by_file[file])
        if size <= wanted:
            held_out.add(file)
            wanted -= size
    splits = {"train": [], "validation": []}
    for document in documents:
        is_held_out = document.url.split("#")[0] in held_out
        splits["validation" if is_held_out else "train"].append(document)
    return splits


def prose_of(string: str) -> str:
    """The full sentences of a string, on one line; "" if they are a single short one.

    A paragraph of which they are only a small part gives none.
    """
    string = re.sub(r":[\w:]+:`~?([^`]*)`", r"`\1`", inspect.cleandoc(string))
    string = re.sub(r"[`*]+([A-Za-z]+)[`*]+", r"\1", string)
    for short, words in _ABBREVIATIONS.items():
        string = string.replace(short, words)
    prose = []
    for paragraph in re.split(r"\n\s*\n", string):
        if _NOT_RUNNING_TEXT.search(paragraph):
            continue
        text = " ".join(paragraph.split())
        sentences = [part for part in _ENDS_A_SENTENCE.split(text) if is_sentence(part)]
        if sum(map(len, sentences)) >= 0.3 * len(text):
            prose += sentences
    text = " ".join(prose)
    return text if len(prose) > 1 or len(text) >= _MIN_SENTENCE_CHARS else ""


def is_sentence(text: str) -> bool:
    """Whether a text is a sentence in plain English: its words, and enough function words."""
    words = text.split()
    if not 6 <= len(words) <= 50 or not text[0].isupper() or text[-1] not in ".!?":
        return False
    common = sum(word.lower().strip(",.") in _COMMON_WORDS for word in words)
    return (
        common >= 0.2 * len(words)
        and text.count("(") == text.count(")")
        and all(map(_WORD_OF_A_SENTENCE.fullmatch, words))
    )


def _is_new(paragraph: str, seen: set[bytes]) -> bool:
    """Whether at most a third of the runs of eight words were seen before; remembers them."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    runs = range(max(1, len(words) - _SHINGLE_WORDS + 1))
    shingles = {" ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in runs}
    digests = {hashlib.blake2b(shingle, digest_size=8).digest() for shingle in shingles}
    is_new = 3 * len(digests & seen) <= len(digests)
    if is_new:
        seen |= digests
    return is_new


def _joined(paragraphs: list[str]) -> Iterator[str]:
    """Documents of some pages each; drops a last one that is too short."""
    text = ""
    for paragraph in paragraphs:
        if text and len(text) + len(paragraph) > _MAX_DOCUMENT_CHARS:
            yield text
            text = ""
        text += ("\n\n" if text else "") + paragraph
    if len(text) >= _MIN_DOCUMENT_CHARS:
        yield text


def documentation() -> Iterator[tuple[str, list[str]]]:
    """(name, strings in the order of the source) of each file, topic and README."""
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(standard_library.rglob("*.py")):
        name = path.relative_to(standard_library)
        if not {"site-packages", "dist-packages", "lib2to3"} & set(name.parts):
            yield from _of_source(name, path)
    for distribution in DISTRIBUTIONS:
        try:
            readme = importlib.metadata.metadata(distribution).get_payload()
        except importlib.metadata.PackageNotFoundError:
            continue
        yield f"{distribution}/README", [readme or ""]
        for name in sorted(importlib.metadata.files(distribution) or ()):
            path = Path(name.locate())
            if name.suffix == ".py":
                yield from _of_source(Path(*name.parts), path)
            elif name.name.lower() in ("readme.md", "readme.rst") and path.is_file():
                yield str(name), [path.read_text(encoding="utf-8", errors="replace")]


def _of_source(name: Path, path: Path) -> Iterator[tuple[str, list[str]]]:
    is_test = name.stem.startswith("test_") or name.stem.endswith("_test")
    if is_test or any(part.endswith(("test", "tests")) for part in name.parts[:-1]):
        return
    try:
        strings = list(long_strings(path.read_text(encoding="utf-8")))
    except (OSError, SyntaxError, ValueError):  # another encoding, a template, a file removed
        return
    if name.as_posix() == "pydoc_data/topics.py":
        yield from ((f"{name}/{i}", [topic]) for i, topic in enumerate(strings))
    elif strings:
        yield name.as_posix(), strings


def long_strings(source: str) -> Iterator[str]:
    """The string constants of 80 characters and more, docstrings and arguments alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        nodes = [ast.parse(source)]
    found = []
    while nodes:  # ast.walk takes three times as long
        node = nodes.pop()
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and len(node.value) >= _MIN_STRING_CHARS:
                found.append((node.lineno, node.col_offset, node.value))
        elif not isinstance(node, ast.JoinedStr):  # an f-string has only fragments
            for value in vars(node).values():
                if isinstance(value, ast.AST):
                    nodes.append(value)
                elif isinstance(value, list):
                    nodes += [item for item in value if isinstance(item, ast.AST)]
    yield from (string for _, _, string in sorted(found))


def main() -> None:
    """Prints where the prepared corpus is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder that receives the corpus")
    print(prepare_corpus(parser.parse_args().data_dir))


if __name__ == "__main__":
    main()
