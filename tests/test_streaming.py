import copy
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar_jax.tokenizers import (
    ByteTokenizer,
    HFTokenizer,
    SentencePieceTokenizer,
    TextStream,
    XLNetTokenizer,
    train_sentencepiece,
)

WORDS = ["The", "boat", "isn't", "far,", "we've", "“quoted”", "naïve", "日本語", "😀", "'", "."]
FALLBACK_PIECES = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁The", "▁n", "'", "t", "."]


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    lines = [" ".join(WORDS[i % 5 :] + WORDS[: i % 7]) for i in range(60)]
    return train_sentencepiece(lines, tmp_path_factory.mktemp("spm") / "small.model", 290)


@pytest.fixture(scope="module")
def xlnet_tokenizer(shared_data):
    return XLNetTokenizer(shared_data / "xlnet" / "spiece.model")


@pytest.fixture(scope="module")
def plain_xlnet_tokenizer(shared_data):
    """Drops the first blank of a text, and prints nothing for control pieces."""
    return SentencePieceTokenizer(shared_data / "xlnet" / "spiece.model")


@pytest.fixture(scope="module")
def xlnet_id(shared_data):
    """From a piece to its id."""
    model = str(shared_data / "xlnet" / "spiece.model")
    return sentencepiece.SentencePieceProcessor(model_file=model).piece_to_id


def write_tokenizer(folder, tokenizer):
    """Saves a Hugging Face tokenizer that has an end token and cleans up decoded text."""
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return HFTokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory):
    """As GPT-2's: every piece is a string of bytes."""
    hf = pytest.importorskip("tokenizers")
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    bpe = hf.models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[])
    tokenizer = hf.Tokenizer(bpe)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    return write_tokenizer(tmp_path_factory.mktemp("byte_level"), tokenizer)


@pytest.fixture(scope="module")
def byte_fallback_tokenizer(tmp_path_factory):
    """As LLaMA's: words, and bytes for the rest; the first blank is stripped."""
    hf = pytest.importorskip("tokenizers")
    vocab = {piece: i for i, piece in enumerate(FALLBACK_PIECES)}
    bpe = hf.models.BPE(vocab, merges=[], byte_fallback=True)
    tokenizer = hf.Tokenizer(bpe)
    steps = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    tokenizer.decoder = hf.decoders.Sequence([*steps, hf.decoders.Strip(" ", 1, 0)])
    return write_tokenizer(tmp_path_factory.mktemp("byte_fallback"), tokenizer)


TOKENIZERS = ["bytes", "sentencepiece", "plain_xlnet", "xlnet", "byte_level", "byte_fallback"]


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return request.getfixturevalue(f"{request.param}_tokenizer")


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [stream.push(i) for i in ids] + [stream.flush()]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_ids_stream_to_their_decoded_text(tokenizer, data):
    common = st.integers(0, min(tokenizer.vocab_size - 1, 40))
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(common | any_id, max_size=200))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=100)
@given(text=st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=60).map(" ".join))
def test_texts_stream_to_their_decoded_text_without_half_characters(tokenizer, text):
    text = text.replace("\ufffd", "")
    ids = tokenizer.encode(text)
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert not any("\ufffd" in part for part in parts)


def test_ids_that_only_the_model_has_stream_as_nothing(tokenizer):
    ids = tokenizer.encode("The boat")
    padded = copy.copy(tokenizer)
    padded.model_vocab_size = tokenizer.vocab_size + 10
    extra = tokenizer.vocab_size + 9
    parts = streamed(padded, [extra, *ids, extra, extra])
    assert "".join(parts) == padded.decode([*ids, extra]) == tokenizer.decode(ids)


def test_a_character_waits_for_its_last_byte():
    stream = TextStream(ByteTokenizer())
    parts = [stream.push(i) for i in ByteTokenizer().encode("a€b😀")]
    assert parts == ["a", "", "", "€", "b", "", "", "", "😀"]


def test_broken_characters_come_out_once_they_are_certain():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte + 6) for byte in b"\xe2\x82a\xe2"] == ["", "", "\ufffda", ""]
    assert stream.flush() == "\ufffd"


def test_words_come_out_at_once_and_blanks_wait_for_what_follows(
    xlnet_tokenizer, xlnet_id, xlnet_model
):
    stream = TextStream(xlnet_tokenizer)
    pieces = ["▁The", "▁dog", "▁", ".", "▁do", "▁", "n", "'", "t", "▁", "n", "ice", "▁"]
    parts = [stream.push(xlnet_id(piece)) for piece in pieces]
    assert parts == ["The", " dog", "", ".", " do", "", "", "", "n't", "", "", " nice", ""]
    assert stream.flush() == " "


def test_clean_up_that_depends_on_all_that_went_before_streams_exactly(xlnet_tokenizer, xlnet_id):
    for count in (2, 3, 200, 201):
        ids = [xlnet_id(piece) for piece in ["▁a", *["▁", "'"] * count, "▁a"]]
        assert "".join(streamed(xlnet_tokenizer, ids)) == xlnet_tokenizer.decode(ids)


def test_a_run_of_byte_pieces_waits_for_its_end(byte_fallback_tokenizer):
    """With Hugging Face one stray byte makes the whole run unreadable."""
    first, second = "é".encode()  # a byte's piece has the byte's value as its id
    stream = TextStream(byte_fallback_tokenizer)
    parts = [stream.push(i) for i in (first, second, FALLBACK_PIECES.index("t"))]
    assert parts == ["", "", "ét"]
    assert streamed(byte_fallback_tokenizer, [first, second, first]) == ["", "", "", "\ufffd" * 3]


def test_a_blank_after_many_silent_ids_stays(plain_xlnet_tokenizer):
    ids = plain_xlnet_tokenizer.encode("The boat")
    ids = ids + [plain_xlnet_tokenizer.eos_id] * 100 + ids
    assert "".join(streamed(plain_xlnet_tokenizer, ids)) == "The boat The boat"


def test_flush_begins_another_text(xlnet_tokenizer):
    stream = TextStream(xlnet_tokenizer)
    ids = xlnet_tokenizer.encode("Hello world")
    for _ in range(2):
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == "Hello world"


class Counting(ByteTokenizer):
    """Counts the ids that it has to decode."""

    decoded = 0

    def decode_raw(self, ids):
        self.decoded += len(ids)
        return super().decode_raw(ids)


@pytest.mark.parametrize("text", ["plain text ", "日本語", "a😀€"])
def test_the_cost_of_a_token_does_not_grow_with_the_text(text):
    tokenizer = Counting()
    ids = tokenizer.encode(text * (6000 // len(text.encode())))
    streamed(tokenizer, ids)
    assert 0 < tokenizer.decoded < 45 * len(ids)
