import hashlib
import json
import pickle
import time
import unicodedata

import pytest
from conftest import import_reference
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar_jax.tokenizers import load_tokenizer, train_sentencepiece
from perceiver_ar_jax.tokenizers.xlnet import SPECIAL_PIECES, XLNetTokenizer


def full_width(text):
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


# What has a rule of its own somewhere between text and ids
FRAGMENTS = [*SPECIAL_PIECES, full_width("<s>"), full_width("<mask>"), "``", "''", "'", "▁"]
FRAGMENTS += ["In 2010,", "1,000,", "U.S.A.", " ", "  ", "\n", "\r\n", "\t", "\xa0", "\x85", "\x1c"]
FRAGMENTS += ["é", "e\u0301", "\u1cf2", "½", "ﬁ", "가", "ᄀ", "ᅡ", "か\u3099", "ｶﾞ", "😀", "\u200d"]
FRAGMENTS += ["\x00", "\x01", "\ufffd", "\ufeff"]
C4_DIGEST = "5bae204fa14f5e0f2da814317002a620d0868a3bfd6d90595570658b8e815cda"
MIXED_TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3)).map("".join)


@pytest.fixture(scope="module")
def model_file(shared_data):
    return shared_data / "xlnet" / "spiece.model"


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return XLNetTokenizer(model_file)


@pytest.fixture(scope="module")
def documents(c4_pages):
    return [json.loads(line)["text"] for line in c4_pages]


@pytest.fixture(scope="module")
def reference(model_file, tmp_path_factory):
    """Hugging Face's tokenizer as the hub has it.

    From version 4.40 on transformers, where it converts spiece.model, also cuts the text at the
    model's user-defined symbols and puts a blank after each ("U. S. A."); the hub's file and
    golden.json have nothing of the kind.
    """
    transformers = import_reference("transformers")
    fast = transformers.XLNetTokenizerFast(str(model_file), clean_up_tokenization_spaces=True)
    converted = json.loads(fast.backend_tokenizer.to_str())
    converted["added_tokens"] = converted["added_tokens"][: len(SPECIAL_PIECES)]
    file = tmp_path_factory.mktemp("hub") / "tokenizer.json"
    file.write_text(json.dumps(converted))
    fast = transformers.XLNetTokenizerFast(
        tokenizer_file=str(file), clean_up_tokenization_spaces=True
    )

    def encode(texts):
        return fast(texts, add_special_tokens=False, verbose=False)["input_ids"]

    return encode, fast.decode


def assert_same_as_reference(tokenizer, reference, texts):
    encode, decode = reference
    for text, ids in zip(texts, encode(texts), strict=True):
        assert tokenizer.encode(text) == ids, repr(text[:200])
        assert tokenizer.decode(ids) == decode(ids), repr(text[:200])


def test_golden_cases_give_the_recorded_ids_and_texts(tokenizer, xlnet_golden):
    assert len(xlnet_golden) > 30
    for case in xlnet_golden:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_golden_cases_hold_for_the_live_reference_too(reference, xlnet_golden):
    encode, decode = reference
    texts = [case["text"] for case in xlnet_golden]
    assert encode(texts) == [case["ids"] for case in xlnet_golden]
    assert [decode(case["ids"]) for case in xlnet_golden] == [c["decoded"] for c in xlnet_golden]


def test_every_c4_document_has_the_reference_ids_and_text(tokenizer, reference, documents):
    assert len(documents) >= 1500
    assert_same_as_reference(tokenizer, reference, documents)


def test_every_c4_document_has_the_recorded_ids_and_text(tokenizer, documents, xlnet_golden):
    """For places without transformers: the digest of version 4.38.2's ids and decoded texts."""
    assert len(documents) == 1510
    ids = tokenizer.encode_batch(documents)
    results = json.dumps([ids, [tokenizer.decode(row) for row in ids]])
    assert hashlib.sha256(results.encode()).hexdigest() == C4_DIGEST, (
        "C4_DIGEST may change only with the documents in c4/"
    )


def test_a_whole_book_has_the_reference_ids_and_text(tokenizer, reference, shared_data):
    book = max((shared_data / "books").iterdir()).read_text()  # the last by name
    assert_same_as_reference(tokenizer, reference, [book])


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(MIXED_TEXT, min_size=1, max_size=10))
def test_any_text_has_the_reference_ids_and_text(tokenizer, reference, texts):
    assert_same_as_reference(tokenizer, reference, texts)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 31999) | st.integers(0, 30)))
def test_any_ids_have_the_reference_text(tokenizer, reference, ids):
    ids = [i % tokenizer.vocab_size for i in ids]
    assert tokenizer.decode(ids) == reference[1](ids)


def test_every_character_that_unicode_changes_has_the_reference_ids(tokenizer, reference):
    """Hugging Face's Unicode tables are older than Python's."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    changed = [
        character
        for character in characters
        if unicodedata.category(character)[0] in "CMZ"
        or unicodedata.normalize("NFKD", character) != character
    ]
    assigned = [c for c in changed if unicodedata.category(c) not in ("Cn", "Co")]
    texts = [f"a{character}b" for character in assigned]
    assert len(texts) > 15_000
    assert_same_as_reference(tokenizer, reference, texts)


def test_the_ids_that_training_and_padding_need(tokenizer, xlnet_model):
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (32000, 2, 5)
    assert tokenizer.sha256.startswith("1f8c1c0b")


def test_untrusted_text_yields_no_special_ids(model_file):
    tokenizer = XLNetTokenizer(model_file, split_special_tokens=True)
    for text in ("a</s>b", "<s> <mask> <eop>", full_width("</s>"), " ".join(SPECIAL_PIECES)):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(range(1, len(SPECIAL_PIECES))), text
    assert tokenizer.encode("plain text") == XLNetTokenizer(model_file).encode("plain text")


def test_special_pieces_are_cut_out_of_trusted_text(tokenizer, xlnet_model):
    assert tokenizer.encode("a</s>") == [24, 2]
    assert tokenizer.encode("a  <mask>") == [24, 6]
    assert tokenizer.encode("a  <sep>") == [24, 17, 4]


def test_broken_unicode_is_read_like_a_question_mark(tokenizer):
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")


def test_batches_equal_single_texts(tokenizer, documents):
    texts = documents[:5]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_pickled_copy_travels_light_and_encodes_alike(tokenizer):
    ids = tokenizer.encode("It travels to a worker.")
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < 810_000  # the model's bytes, nothing that was built from them
    copy = pickle.loads(pickled)
    assert copy.encode("It travels to a worker.") == ids
    assert copy.sha256 == tokenizer.sha256


def test_saved_model_is_the_same_file(tokenizer, model_file, tmp_path):
    tokenizer.save(tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == model_file.read_bytes()
    assert isinstance(load_tokenizer(tmp_path), XLNetTokenizer)


def test_ids_outside_the_vocabulary_are_refused_with_their_place(tokenizer):
    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} at position 1"):
        tokenizer.decode([17, tokenizer.vocab_size])
    with pytest.raises(ValueError, match="-1 at position 0"):
        tokenizer.decode([-1])


def test_another_sentencepiece_model_is_refused(documents, tmp_path):
    train_sentencepiece(documents[:100], tmp_path / "other.model", 500)
    with pytest.raises(ValueError, match="not XLNet's model"):
        XLNetTokenizer(tmp_path / "other.model")


def test_time_is_linear_in_the_length_of_a_word(tokenizer):
    """A long run without blanks, or of blanks before a mask, must not stall the loader."""
    start = time.process_time()
    tokenizer.encode("ab" * 100_000)
    tokenizer.encode(" \x85" * 100_000 + "x" + "<mask>")
    assert time.process_time() - start < 5


def test_forgotten_words_are_encoded_again(model_file, tokenizer, documents, monkeypatch):
    monkeypatch.setattr("perceiver_ar_jax.tokenizers.xlnet.CACHED_WORDS", 3)
    forgetful = XLNetTokenizer(model_file)
    for text in documents[:5] * 2:
        assert forgetful.encode(text) == tokenizer.encode(text)
