import hashlib
import pickle

import pytest
from conftest import import_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar_jax.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

TEXTS = [
    f"The {noun} number {i} sees  another {noun},\n\n\tand then it leaves (as ever)."
    for i in range(60)
    for noun in ("house", "river", "teacher", "question", "yellow bird", "government")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SentencePieceTokenizer:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("spm") / "small.model", 300)


def test_bytes_have_the_ids_of_the_perceiver_tokenizer():
    assert ByteTokenizer().encode("Ab\n") == [65 + 6, 98 + 6, 10 + 6]
    assert ByteTokenizer().decode([2, 71, 104, 0]) == "Ab"


def test_bytes_agree_with_hugging_faces_perceiver_tokenizer():
    transformers = import_reference("transformers")
    theirs = transformers.PerceiverTokenizer(clean_up_tokenization_spaces=False)
    text = "Größe 5 €, \U0001f389\n\n  end"
    assert ByteTokenizer().encode(text) == theirs(text, add_special_tokens=False).input_ids
    ours = ByteTokenizer()
    assert (ours.vocab_size, ours.pad_id, ours.eos_id) == (262, theirs.pad_token_id, 2)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_bytes_give_every_text_back(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_a_trained_vocabulary_gives_every_text_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_a_trained_vocabulary_keeps_newlines_blanks_and_tabs(trained):
    for text in (*TEXTS[:7], "  a   b \n\n\n c\t\td \r\n", "<pad></s>", "\ufeff x"):
        assert trained.decode(trained.encode(text)) == text
    assert (trained.pad_id, trained.eos_id, trained.vocab_size) == (0, 1, 300)


def test_training_twice_gives_the_same_file(trained, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "again.model", 300)
    assert again.sha256 == trained.sha256
    assert hashlib.sha256((tmp_path / "again.model").read_bytes()).hexdigest() == again.sha256


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="5000: the text is enough for"):
        train_sentencepiece(["a few words"], tmp_path / "small.model", 5000)
    with pytest.raises(ValueError, match="vocabulary of 5000"):
        train_sentencepiece([], tmp_path / "small.model", 5000)
    with pytest.raises(ValueError, match="263: its characters alone need 270"):
        train_sentencepiece(["a few words"], tmp_path / "small.model", 263)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_saved_tokenizer_loads_from_its_folder_and_survives_pickling(kind, trained, tmp_path):
    tokenizer = ByteTokenizer() if kind == "bytes" else trained
    tokenizer.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer)
        assert copy.sha256 == tokenizer.sha256
        assert copy.encode_batch(TEXTS[:3]) == [tokenizer.encode(text) for text in TEXTS[:3]]


def test_xlnets_model_has_its_special_ids(xlnet_model):
    xlnet = load_tokenizer(xlnet_model, vocab_size=32000)
    assert (xlnet.vocab_size, xlnet.eos_id, xlnet.pad_id) == (32000, 2, 5)
    assert xlnet.encode("Hello world") == [17, 11368, 185]


def test_xlnets_model_gives_exact_ids_wherever_it_is_loaded_from(trained, shared_data, tmp_path):
    model = shared_data / "xlnet" / "spiece.model"
    load_tokenizer(model).save(tmp_path)
    for source in (model, tmp_path):
        assert load_tokenizer(source).encode("café") == load_tokenizer(source).encode("cafe")
    assert type(load_tokenizer(trained.path)) is SentencePieceTokenizer


def test_lone_surrogates_are_replaced_not_fatal(trained):
    assert trained.decode(trained.encode("a\ud800b")) == "a?b"
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 798011\n", "798011"),
        (b"PK\x03\x04 something", "begins with"),
        (b"\n\xff\xff broken protobuf", "begins with"),
    ],
)
def test_a_file_that_is_not_a_model_is_described(content, message, tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_names_the_path(tmp_path):
    with pytest.raises(ValueError, match=r"nothere\.model"):
        load_tokenizer(tmp_path / "nothere.model")
    with pytest.raises(ValueError, match=r"looked for spiece\.model"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_larger_than_the_models_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    with pytest.raises(ValueError, match="300 ids"):
        load_tokenizer(tmp_path, vocab_size=262)


def test_an_id_outside_the_vocabulary_is_named_with_its_place(trained):
    for tokenizer in (trained, ByteTokenizer()):
        with pytest.raises(ValueError, match=r"token id 5000 at position 1"):
            tokenizer.decode([3, 5000])


def test_ids_that_only_the_model_has_print_nothing(trained):
    for source in ("bytes", trained.path):
        tokenizer = load_tokenizer(source, vocab_size=384)
        assert tokenizer.decode([383, *tokenizer.encode("a boat"), 300, 383]) == "a boat"
        assert pickle.loads(pickle.dumps(tokenizer)).decode([383]) == ""
        with pytest.raises(ValueError, match=r"token id 384 at position 1 is outside 0\.\.383"):
            tokenizer.decode([3, 384])
    assert load_tokenizer("bytes").model_vocab_size == 262
