"""Any bytes, ids or settings give the right answer, or a ValueError of ours."""

import json
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perceiver_ar_jax.data import DataConfig, make_loader
from perceiver_ar_jax.data.prepare.tfds_convert import _write_array_record, _write_tfrecord
from perceiver_ar_jax.data.record_files import ArrayRecordFile, TFRecordFile, tfrecords
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.data.tf_example import bytes_feature
from perceiver_ar_jax.tokenizers import (
    ByteTokenizer,
    TextStream,
    load_tokenizer,
    train_sentencepiece,
)

RECORDS = [f"record {i} ".encode() * (7 * i % 40) for i in range(12)]


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """Inputs have a few KiB; no length in them, however large, is trusted."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    before = peak()
    yield
    assert peak() - before < 400 << 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERCEIVER_AR_CACHE", str(folder / "cache"))
        yield


EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "replace", "cut")),
        st.integers(0, (1 << 16) - 1),
        st.integers(0, 7),
        st.binary(max_size=10),
    ),
    min_size=1,
    max_size=3,
)


def mutated(original: bytes, edits) -> bytes:
    """A few bits flipped, bytes replaced by others, or the end cut off."""
    data = bytearray(original)
    for kind, place, size, replacement in edits:
        place %= len(data) + 1
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << size
        elif kind == "replace":
            data[place : place + size] = replacement
        elif kind == "cut":
            del data[place:]
    return bytes(data)


def right_or_value_error(read, expected):
    """Runs `read`, which must return the expected value or raise one line."""
    try:
        result = read()
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert result == expected


def texts_of(source) -> list[str]:
    return [source[i].text for i in range(len(source))]


# tf.train.Example


def varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def example(features: dict[str, list[bytes]]) -> bytes:
    entries = (
        field(1, name.encode()) + field(2, field(1, b"".join(field(1, value) for value in values)))
        for name, values in features.items()
    )
    return field(1, b"".join(field(1, entry) for entry in entries))


EXAMPLES = st.dictionaries(st.text(max_size=20), st.lists(st.binary(max_size=300), max_size=3))


@given(features=EXAMPLES, values=st.lists(st.binary(max_size=300), max_size=2), at=st.data())
def test_any_example_gives_its_first_value(features, values, at):
    items = list({**features, "text": values}.items())
    shuffled = dict(at.draw(st.permutations(items)))
    assert bytes_feature(example(shuffled), "text") == (values[0] if values else b"")


@given(edits=EDITS)
def test_a_mutated_example_gives_a_part_of_it_or_an_error(edits):
    whole = example({"url": [b"http://a"], "text": [b"some text " * 20], "empty": []})
    data = mutated(whole, edits)
    try:
        assert bytes_feature(data, "text") in data
    except ValueError as error:
        assert "example" in str(error)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_example_or_an_error(data):
    try:
        assert bytes_feature(data, "text") in data
    except ValueError as error:
        assert "example" in str(error)


def test_an_endless_length_is_refused_at_once():
    with pytest.raises(ValueError, match="an example is damaged"):
        bytes_feature(b"\x0a" + b"\xff" * 3_000_000, "text")


# Record files


@pytest.fixture(scope="module")
def framed(folder) -> bytes:
    _write_tfrecord(str(folder / "good.tfrecord"), RECORDS)
    return (folder / "good.tfrecord").read_bytes()


@pytest.fixture(scope="module")
def array_records(folder) -> bytes:
    _write_array_record(str(folder / "good.array_record"), RECORDS)
    return (folder / "good.array_record").read_bytes()


def read_file(file) -> list[bytes]:
    return [file.read(i) for i in range(len(file))]


@given(edits=EDITS)
def test_a_mutated_tfrecord_gives_whole_records_or_an_error(framed, folder, edits):
    path = folder / "mutated.tfrecord"
    path.write_bytes(mutated(framed, edits))
    for read in (lambda: list(tfrecords(str(path))), lambda: read_file(TFRecordFile(str(path)))):
        try:
            records = read()
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # cut off between two records, or one of them taken out whole
            assert all(record in RECORDS for record in records)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_tfrecord_or_an_error(folder, data):
    path = folder / "any.tfrecord"
    path.write_bytes(data)
    right_or_value_error(lambda: list(tfrecords(str(path))), [])


@given(edits=EDITS, in_footer=st.booleans())
def test_a_mutated_array_record_gives_all_records_or_an_error(
    array_records, folder, edits, in_footer
):
    path = folder / "mutated.array_record"
    split = len(array_records) - (64 << 10)  # blocks of 64 KiB, filled up with zeros
    data = array_records[:split].rstrip(b"\0")
    zeros = bytes(split - len(data))
    if in_footer:
        path.write_bytes(data + zeros + mutated(array_records[split:], edits))
    else:
        path.write_bytes(mutated(data, edits) + zeros + array_records[split:])
    right_or_value_error(lambda: read_file(ArrayRecordFile(str(path))), RECORDS)


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_not_an_array_record(folder, data):
    path = folder / "any.array_record"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"any\.array_record \(\d+ bytes\)"):
        ArrayRecordFile(str(path))


# JSON lines, plain text and how they are cut


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
DOCUMENTS = st.lists(st.text(max_size=60), min_size=1, max_size=8)


@given(texts=DOCUMENTS, other=st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_any_text_comes_back_from_json_lines(folder, texts, other):
    path = folder / "good.jsonl"
    path.write_text("\n".join(json.dumps({**other, "text": text}) for text in texts))
    assert texts_of(open_source(str(path), "train")) == texts


@given(lines=st.lists(st.binary(max_size=80) | JSON.map(json.dumps).map(str.encode), max_size=5))
def test_any_lines_are_read_or_counted(folder, lines):
    path = folder / "any.jsonl"
    path.write_bytes(b"\n".join([*lines, b'{"text": "end"}']))
    source = open_source(str(path), "train")
    found = [source[i] for i in range(len(source))]
    assert found[-1].text == "end"
    assert all(not text.text for text in found if text.is_malformed)


@pytest.mark.parametrize("line", [b"[" * 100_000, b"9" * 5000, b'{"text":' * 100_000])
def test_a_line_made_to_exhaust_the_parser_is_malformed(folder, line):
    path = folder / "deep.jsonl"
    path.write_bytes(line)
    assert open_source(str(path), "train")[0].is_malformed


@given(data=st.binary(max_size=6000) | st.text(max_size=3000).map(str.encode))
def test_the_pieces_of_any_text_join_to_it(folder, data):
    path = folder / "any.txt"
    path.write_bytes(data or b"x")
    source = open_source(str(path), "train")
    if all(source[i].is_valid_utf8 for i in range(len(source))):
        assert "".join(texts_of(source)).encode() == (data or b"x")
    assert [source[i].ends_document for i in range(len(source))][-1]


@given(
    split=st.from_regex(r"train(\[-?[0-9]*%?:-?[0-9]*%?\])?", fullmatch=True) | st.text(max_size=12)
)
def test_any_split_is_a_part_of_the_whole_or_an_error(folder, split):
    path = folder / "ten.jsonl"
    path.write_text("\n".join(json.dumps({"text": str(i)}) for i in range(10)))
    try:
        texts = texts_of(open_source(str(path), split))
    except ValueError as error:
        assert "split" in str(error) and "\n" not in str(error)
    else:
        assert "".join(texts) in "0123456789"


@given(texts=DOCUMENTS, low=st.integers(1, 9), more=st.integers(0, 9), rows=st.integers(1, 3))
def test_the_batches_of_any_documents_hold_all_their_tokens(folder, texts, low, more, rows):
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = ByteTokenizer()
    config = DataConfig(
        source=str(path),
        min_seq_len=low,
        max_seq_len=low + more,
        batch_size=rows,
        repeat=False,
        shuffle=False,
    )
    streams = [[] for _ in range(rows)]
    for batch in make_loader(config, tokenizer):
        for row, stream in enumerate(streams):
            kept = ~batch["pad_mask"][row]
            stream += [*batch["tokens"][row][kept][:1], *batch["targets"][row][kept]]
    for row, stream in enumerate(streams):
        ids = [
            i
            for text in texts[row::rows]
            if text
            for i in (*tokenizer.encode(text), tokenizer.eos_id)
        ]
        assert stream in (ids, ids[:-1])  # a last token by itself predicts nothing


# Tokenizers


@pytest.fixture(scope="module")
def trained(folder):
    texts = [f"The house number {i} sees another river, ü€ (as ever)." for i in range(100)]
    return train_sentencepiece(texts, folder / "small.model", 296)


@given(data=st.data())
def test_ids_decode_and_stream_to_text_or_an_error_with_the_place(trained, data):
    tokenizer = data.draw(st.sampled_from([trained, ByteTokenizer()]))
    inside = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(inside | st.integers(-(2**70), 2**70), max_size=30))
    outside = [place for place, i in enumerate(ids) if not 0 <= i < tokenizer.vocab_size]
    stream = TextStream(tokenizer)
    if not outside:
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)
        return
    with pytest.raises(ValueError, match=rf"token id {ids[outside[0]]} at position {outside[0]} "):
        tokenizer.decode(ids)
    with pytest.raises(ValueError, match=rf"token id {ids[outside[0]]} "):
        list(map(stream.push, ids))


@given(text=st.text(), edits=EDITS)
def test_a_mutated_sentencepiece_model_works_or_is_refused(trained, folder, text, edits):
    path = folder / "mutated.model"
    path.write_bytes(mutated((folder / "small.model").read_bytes(), edits))
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert isinstance(tokenizer.decode(ids), str)


@given(edits=EDITS, which=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_a_mutated_tokenizer_json_works_or_is_refused(folder, edits, which):
    hf = pytest.importorskip("tokenizers")
    vocabulary = [("<unk>", 0.0), ("▁a", -1.5), ("b", -2.0), ("▁", -2.5), ("</s>", -9.0)]
    made = hf.Tokenizer(hf.models.Unigram(vocabulary, unk_id=0))
    made.normalizer = hf.normalizers.NFKD()
    made.pre_tokenizer, made.decoder = hf.pre_tokenizers.Metaspace(), hf.decoders.Metaspace()
    files = {
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": '{"eos_token": "</s>", "pad_token": {"content": "b"}}',
    }
    for name, text in files.items():
        (folder / name).write_bytes(mutated(text.encode(), edits if name == which else []))
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        ids = tokenizer.encode("ab b, a")
    except ValueError as error:
        assert "tokenizer" in str(error)
        return
    assert isinstance(tokenizer.decode(ids), str)


@given(data=st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode))
def test_any_tokenizer_config_is_read_or_refused(folder, data):
    alone = folder / "alone"
    alone.mkdir(exist_ok=True)
    (alone / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(ValueError, match="looked for"):
        load_tokenizer(alone)
