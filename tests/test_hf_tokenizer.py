import json
import pickle
import sys

import pytest
from conftest import import_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar_jax.tokenizers import HFTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def reference(shared_data):
    transformers = import_reference("transformers")
    model = str(shared_data / "xlnet" / "spiece.model")
    return transformers.XLNetTokenizerFast(model, clean_up_tokenization_spaces=True)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """What save_pretrained writes, as in a model's directory on the hub."""
    folder = tmp_path_factory.mktemp("saved")
    reference.save_pretrained(folder)
    (folder / "spiece.model").unlink()
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return HFTokenizer(folder / "tokenizer.json")


def word_tokenizer(path, end_token="</s>", **fields):
    """A tokenizer.json of two words, without other files next to it."""
    hf = pytest.importorskip("tokenizers")
    words = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "a": 1, ".": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    words.add_special_tokens([end_token])
    path.write_text(json.dumps(json.loads(words.to_str()) | fields))
    return path


def assert_same_as_reference(tokenizer, reference, texts):
    expected = reference(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.encode_batch(texts) == expected
    for ids in expected:
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_c4_documents_have_the_reference_ids_and_texts(tokenizer, reference, c4_pages):
    texts = [json.loads(line)["text"] for line in c4_pages[-30:]]
    assert_same_as_reference(tokenizer, reference, texts)


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_any_text_has_the_reference_ids_and_text(tokenizer, reference, text):
    assert_same_as_reference(tokenizer, reference, [text])
    assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0]


def test_special_ids_are_those_that_the_files_name(tokenizer, xlnet_model):
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (32000, 2, 5)
    assert tokenizer.decode([17, 11368, 2]) == "Hello</s>"


def test_files_next_to_the_tokenizer_override_the_usual_names(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json")
    config = {"eos_token": {"content": "."}, "pad_token": "a", "clean_up_tokenization_spaces": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = HFTokenizer(path)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 1)
    assert tokenizer.decode([1, 2]) == "a."


def test_a_tokenizer_json_alone_is_enough(tmp_path):
    tokenizer = HFTokenizer(word_tokenizer(tmp_path / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (4, 3, 3)
    assert tokenizer.decode([1, 2]) == "a ."


def test_stored_padding_and_truncation_do_not_touch_the_ids(tmp_path):
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[UNK]"}
    path = word_tokenizer(tmp_path / "tokenizer.json", truncation=truncation, padding=padding)
    assert HFTokenizer(path).encode_batch(["a . a", "a"]) == [[1, 2, 1], [1]]


def test_broken_unicode_is_read_like_a_question_mark(tokenizer):
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")


def test_a_pickled_copy_encodes_alike(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("It travels to a worker.") == tokenizer.encode("It travels to a worker.")
    assert (copy.sha256, copy.eos_id) == (tokenizer.sha256, tokenizer.eos_id)


def test_a_saved_tokenizer_loads_with_the_same_ids(tokenizer, folder, tmp_path):
    assert tokenizer.save(tmp_path) == tmp_path / "tokenizer.json"
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, HFTokenizer)
    for name in ("vocab_size", "eos_id", "pad_id", "sha256", "cleans_up"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


def test_the_missing_package_is_named_with_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'perceiver-ar-jax\[hub\]'"):
        HFTokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "<!DOCTYPE html>", "[1, 2]", "{}", '{"model": {}}'])
def test_a_file_that_is_not_a_tokenizer_is_refused_by_name(content, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json .*is no"):
        HFTokenizer(tmp_path / "tokenizer.json")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json"):
        HFTokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", end_token="<odd>")
    with pytest.raises(ValueError, match="no token to end documents"):
        HFTokenizer(path)


def test_ids_outside_the_vocabulary_are_refused_with_their_place(tmp_path):
    tokenizer = HFTokenizer(word_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="4 at position 1"):
        tokenizer.decode([1, 4])


def test_ids_without_a_token_print_nothing(tmp_path):
    """Holes in the vocabulary, and what a padded model has beyond it."""
    path = word_tokenizer(tmp_path / "tokenizer.json")
    parsed = json.loads(path.read_text())
    parsed["model"]["vocab"]["b"] = 9
    path.write_text(json.dumps(parsed))
    tokenizer = load_tokenizer(path, vocab_size=16)
    assert tokenizer.vocab_size == 10
    assert tokenizer.decode([1, 5, 9, 10, 15]) == "a b"
