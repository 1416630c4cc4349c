import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from perceiver_ar_jax.data.prepare import corpus
from perceiver_ar_jax.data.prepare.tfds_writer import Document, write_dataset
from perceiver_ar_jax.tokenizers import XLNetTokenizer, load_tokenizer

PROSE = (
    "This is the first sentence of a text that is long enough to be kept. It reads as English "
    "because it has the little words that English has in it, which is what the filter asks for."
)
OTHER = "Another thing is said here, so that it is not empty. And it has a second one as well. "


def strings_of(package: str) -> list[tuple[str, list[str]]]:
    folder = Path(sysconfig.get_paths()["stdlib"]) / package
    return [
        (path.name, list(corpus.long_strings(path.read_text())))
        for path in sorted(folder.glob("*.py"))
    ]


def test_docstrings_and_long_arguments_are_found_but_no_parts_of_f_strings():
    long = "word " * 20
    source = f'"""{long}1"""\nprint("{long}2", f"{long}3{{x}}")\nhelp(text="{long}4", y="short")\n'
    assert list(corpus.long_strings(source)) == [long + "1", long + "2", long + "4"]


def test_prose_is_the_full_sentences_of_running_text():
    string = f"""A heading of the list is that
    --------------------------

    {PROSE} And `it` is *also* told that :class:`~a.B` is one
    of the words that cannot be in it.

    name (str): This is a sentence about what is given to it.
    - This is a sentence that is an item of a list.

    >>> This("is an example of what can be done with it.")
    """
    assert corpus.prose_of(string) == PROSE
    assert corpus.prose_of(PROSE + " And `it` is so in the *other* text.").endswith(
        " And it is so in the other text."
    )


def test_a_paragraph_that_is_mostly_other_text_gives_nothing():
    code = "x = foo(bar, baz)[0] " * 40
    assert corpus.prose_of(f"{PROSE}\n\n{code}") == PROSE
    assert corpus.prose_of(f"{PROSE} {code}") == ""


def test_a_single_sentence_is_not_prose():
    assert corpus.prose_of(PROSE.split(". ")[0] + ".") == ""


@pytest.mark.parametrize(
    "text",
    [
        "The value of x_0 is that of the first.",
        "the first of the values that are in it.",
        "The first of the values that are in it:",
        "The value is one.",
        "Numpy Scipy Jax Flax Optax Orbax Grain.",
        "The value (which is that of the first is kept.",
    ],
)
def test_what_is_not_a_sentence_in_plain_english(text):
    assert corpus.is_sentence("The value (which is that of the first) isn't kept, e-mail it.")
    assert not corpus.is_sentence(text)


def test_a_text_that_differs_in_two_words_is_kept_once():
    again = PROSE.replace("first", "second").replace("little", "small")
    twice = f"{PROSE} {PROSE}"
    documents = corpus.collect_documents([("a", [twice]), ("b", [again, PROSE, OTHER * 3])])
    assert [document.text for document in documents] == [twice, (OTHER * 3).strip()]


def test_validation_takes_whole_files_and_about_five_percent():
    documents = corpus.collect_documents(strings_of("asyncio") + strings_of("email"))
    splits = corpus.split_documents(documents * 2)
    files = {name: {d.url.split("#")[0] for d in split} for name, split in splits.items()}
    assert not files["train"] & files["validation"]
    share = sum(len(d.text) for d in splits["validation"]) / sum(len(d.text) for d in documents * 2)
    assert 0.025 < share <= 0.05


def test_the_corpus_is_deterministic_and_prepared_once(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "documentation", lambda: strings_of("asyncio"))
    first, second = (corpus.prepare_corpus(tmp_path / name) for name in "ab")
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    monkeypatch.delattr(corpus, "documentation")
    assert corpus.prepare_corpus(tmp_path / "a") == first


def test_the_data_for_tests_can_be_made_without_the_hub(monkeypatch, tmp_path):
    path = Path(__file__).resolve().parent.parent / "tools" / "make_test_data.py"
    spec = importlib.util.spec_from_file_location("make_test_data", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "documentation", lambda: strings_of("email"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    tool.make_test_data(tmp_path / "data")
    pages = (tmp_path / "data" / "c4" / "pages.jsonl").read_text().splitlines()
    assert len(pages) > 10
    assert (tmp_path / "data" / "books" / "documentation.txt").stat().st_size > 10_000
    tokenizer = load_tokenizer(tmp_path / "data" / "xlnet")
    assert isinstance(tokenizer, XLNetTokenizer)
    text = "The parser is a thing - it reads (and checks) a message."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tfds_reads_what_was_written_with_c4s_features(tmp_path):
    import tensorflow_datasets as tfds

    splits = {
        "train": [Document(f"Text {i} ü", url=f"u{i}") for i in range(20)],
        "validation": [Document("one")],
    }
    where = write_dataset(
        splits, name="c4", config="en", version="3.0.1", data_dir=tmp_path, num_shards=4
    )
    assert where == tmp_path / "c4" / "en" / "3.0.1"
    builder = tfds.builder_from_directory(where)
    assert builder.info.splits["train"].num_examples == 20
    examples = list(builder.as_data_source("train"))
    assert {example["text"].decode() for example in examples} == {d.text for d in splits["train"]}
    assert set(json.loads(json.dumps(list(examples[0])))) == {
        "text",
        "url",
        "timestamp",
        "content-type",
        "content-length",
    }


@pytest.mark.slow
def test_the_real_corpus_is_large_enough_and_its_parts_share_no_paragraphs():
    splits = corpus.split_documents(corpus.collect_documents(corpus.documentation()))
    sizes = {name: sum(len(d.text.encode()) for d in split) for name, split in splits.items()}
    assert 0.8e6 < sizes["train"] < 3e6
    assert 0.04 < sizes["validation"] / sizes["train"] < 0.06

    def runs(split):
        for document in split:
            for paragraph in document.text.split("\n\n"):
                words = paragraph.lower().split()
                yield {" ".join(words[i : i + 12]) for i in range(len(words) - 11)}

    known = set().union(*runs(splits["train"]))
    held_out = [paragraph for paragraph in runs(splits["validation"]) if paragraph]
    copied = [paragraph for paragraph in held_out if len(paragraph & known) > len(paragraph) / 2]
    assert len(held_out) > 100
    assert len(copied) <= len(held_out) / 100
