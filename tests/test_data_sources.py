import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from perceiver_ar_jax.data.crc32c import crc32c, masked_crc32c
from perceiver_ar_jax.data.prepare.tfds_convert import to_array_record, to_tfrecord
from perceiver_ar_jax.data.prepare.tfds_writer import Document, write_dataset
from perceiver_ar_jax.data.record_files import MAX_PIECE_BYTES, ArrayRecordFile, TFRecordFile
from perceiver_ar_jax.data.sources import Text, open_source
from perceiver_ar_jax.data.text_documents import tokenize
from perceiver_ar_jax.data.tf_example import bytes_feature

TEXTS = [f"document {i} " + "ü€" * (i * 37 % 400) for i in range(45)]
FORMATS = ["array_record", "tfrecord"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    """The same documents as ArrayRecord and as TFRecord, C4's layout, 3 shards."""
    folder = tmp_path_factory.mktemp("c4")
    splits = {
        "train": [Document(text, url=f"http://a/{i}") for i, text in enumerate(TEXTS)],
        "validation": [Document(f"held out {i}") for i in range(6)],
    }
    arrays = write_dataset(
        splits, name="c4", config="en", version="3.0.1", data_dir=folder / "a", num_shards=3
    )
    to_tfrecord(arrays, folder / "t" / "c4" / "en" / "3.0.1")
    return {"array_record": arrays, "tfrecord": folder / "t" / "c4" / "en" / "3.0.1"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PERCEIVER_AR_CACHE", str(tmp_path / "cache"))


def texts_of(source) -> list[str]:
    return [source[i].text for i in range(len(source))]


def copy_with(folder: Path, tmp_path: Path, name: str, change) -> Path:
    """A copy of a dataset in which one file's bytes are changed."""
    for path in folder.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(change(data) if name in path.name else data)
    return tmp_path


def test_both_formats_give_the_same_texts_in_the_same_order(prepared):
    arrays, records = (open_source(str(prepared[name]), "train") for name in FORMATS)
    assert texts_of(arrays) == texts_of(records)
    assert sorted(texts_of(arrays)) == sorted(TEXTS)
    assert arrays[3] == Text(arrays[3].text, True, True, False)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "split, begin, end",
    [("train[:40%]", 0, 18), ("train[10:31]", 10, 31), ("train[-5:]", 40, 45)],
)
def test_slices_of_a_split_are_those_of_tfds(prepared, file_format, split, begin, end):
    whole = texts_of(open_source(str(prepared[file_format]), "train"))
    assert texts_of(open_source(str(prepared[file_format]), split)) == whole[begin:end]


def test_tfds_itself_reads_the_same(prepared):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(prepared["array_record"]).as_data_source("train[:40%]")
    ours = open_source(str(prepared["array_record"]), "train[:40%]")
    assert [example["text"].decode() for example in source] == texts_of(ours)
    records = tfds.builder_from_directory(prepared["tfrecord"])
    assert records.info.splits["train"].num_examples == len(TEXTS)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_source_survives_pickling_and_reads_at_random(prepared, file_format):
    source = open_source(str(prepared[file_format]), "train")
    expected = texts_of(source)
    copy = pickle.loads(pickle.dumps(source))
    order = random.Random(0).sample(range(len(source)), len(source))
    assert [copy[i].text for i in order] == [expected[i] for i in order]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_truncated_shard_is_named_with_its_size(prepared, file_format, size, tmp_path):
    shard = f"c4-train.{file_format}-00001-of-00003"
    broken = copy_with(prepared[file_format], tmp_path, shard, lambda data: data[:size])
    with pytest.raises(ValueError, match=shard if size else "missing or empty") as caught:
        texts_of(open_source(str(broken), "train"))
    assert "\n" not in str(caught.value)
    assert shard in str(caught.value)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("place", [70, 150, 300])
def test_a_flipped_bit_is_never_read_as_text(prepared, file_format, place, tmp_path):
    shard = f"c4-train.{file_format}-00000-of-00003"

    def flip(data: bytes) -> bytes:
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    broken = copy_with(prepared[file_format], tmp_path, shard, flip)
    with pytest.raises(ValueError, match=shard):
        texts_of(open_source(str(broken), "train"))


def test_a_missing_shard_is_named(prepared, tmp_path):
    folder = copy_with(prepared["tfrecord"], tmp_path, "none", bytes)
    (folder / "c4-train.tfrecord-00002-of-00003").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 files are missing .*train.tfrecord-00002"):
        open_source(str(folder), "train")
    assert len(open_source(str(folder), "validation")) == 6


def test_a_shard_of_another_dataset_is_detected(prepared, tmp_path):
    other = prepared["array_record"] / "c4-validation.array_record-00000-of-00003"
    shard = "c4-train.array_record-00000-of-00003"
    folder = copy_with(prepared["array_record"], tmp_path, shard, lambda _: other.read_bytes())
    with pytest.raises(ValueError, match=r"has 2 records, 15 were expected"):
        texts_of(open_source(str(folder), "train"))


def test_wrong_paths_and_splits_are_reported_with_what_exists(prepared, tmp_path):
    folder = prepared["array_record"]
    with pytest.raises(ValueError, match=rf"did you mean {folder}\?"):
        open_source(str(folder.parent), "train")
    with pytest.raises(ValueError, match=r"no split 'trian': it has train, validation"):
        open_source(str(folder), "trian")
    with pytest.raises(ValueError, match="no data at"):
        open_source(str(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match="no data at"):
        open_source(str(tmp_path / "*.txt"), "train")
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"cannot read the split 'train\[1'"):
        open_source(str(tmp_path / "x.jsonl"), "train[1")
    (tmp_path / "y.txt").write_text("y")
    with pytest.raises(ValueError, match=r"\.jsonl and \.txt files as one corpus"):
        open_source(str(tmp_path / "*"), "train")


def test_the_tfrecord_index_is_made_once_and_again_for_a_changed_file(prepared, tmp_path):
    path = tmp_path / "x.tfrecord"
    original = (prepared["tfrecord"] / "c4-train.tfrecord-00000-of-00003").read_bytes()
    path.write_bytes(original)
    first = TFRecordFile(str(path))
    (index,) = (tmp_path / "cache" / "tfrecord").iterdir()
    written = index.stat().st_mtime_ns
    assert len(TFRecordFile(str(path))) == len(first)
    assert index.stat().st_mtime_ns == written
    path.write_bytes(original + original)
    assert len(TFRecordFile(str(path))) == 2 * len(first)


def test_conversion_keeps_the_records_and_continues_after_an_interruption(prepared, tmp_path):
    target = tmp_path / "again"
    assert len(to_array_record(prepared["tfrecord"], target)) == 6
    for path in prepared["array_record"].iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    shard = "c4-train.array_record-00001-of-00003"
    (target / shard).unlink()
    assert to_array_record(prepared["tfrecord"], target) == [shard]
    assert texts_of(open_source(str(target), "train")) == texts_of(
        open_source(str(prepared["tfrecord"]), "train")
    )


def test_one_split_can_be_converted_alone(prepared, tmp_path):
    to_array_record(prepared["tfrecord"], tmp_path, splits=["validation"])
    assert len(open_source(str(tmp_path), "validation")) == 6
    with pytest.raises(ValueError, match="no split 'train': it has validation"):
        open_source(str(tmp_path), "train")
    with pytest.raises(ValueError, match="holds array_record files, not tfrecord"):
        to_array_record(prepared["array_record"], tmp_path)


def test_a_shard_that_lost_its_last_records_is_not_converted(prepared, tmp_path):
    shard = "c4-train.tfrecord-00001-of-00003"
    first = slice(0, TFRecordFile(str(prepared["tfrecord"] / shard))._offsets[5])
    (tmp_path / "short").mkdir()
    short = copy_with(prepared["tfrecord"], tmp_path / "short", shard, lambda data: data[first])
    with pytest.raises(ValueError, match=rf"{shard} has 5 records, 15 were expected"):
        to_array_record(short, tmp_path / "target")
    assert not (tmp_path / "target" / shard.replace("tfrecord", "array_record")).exists()
    assert not (tmp_path / "target" / "dataset_info.json").exists()


def test_the_tools_make_a_fixture_and_convert_it(tmp_path):
    root = Path(__file__).resolve().parent.parent
    jsonl = tmp_path / "pages.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in TEXTS))

    def run(*command):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    made = run(root / "tools" / "make_c4_fixture.py", jsonl, "--output", tmp_path, "--shards", 2)
    assert made.returncode == 0, made.stderr
    arrays, records = made.stdout.split()
    assert arrays.endswith("/array_record/c4/en/3.0.1")
    assert len(open_source(arrays, "train")) == len(open_source(records, "train")) == 42
    tool = root / "tools" / "to_array_record.py"
    back = run(tool, records, tmp_path / "back", "--processes", 1, "--split", "validation")
    assert back.returncode == 0, back.stderr
    assert len(open_source(str(tmp_path / "back"), "validation")) == 3
    wrong = run(tool, tmp_path, tmp_path / "back")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


def test_an_array_record_is_read_by_a_range(prepared):
    file = ArrayRecordFile(str(prepared["array_record"] / "c4-train.array_record-00000-of-00003"))
    assert b"document" in bytes_feature(file.read(len(file) - 1), "text")
    with pytest.raises(ValueError, match="array_record-00000"):
        file.read(len(file))


def test_examples_are_walked_without_tensorflow():
    value = "ü" * 300
    entry = b"\x0a\x04text" + b"\x12\xde\x04" + b"\x0a\xdb\x04" + b"\x0a\xd8\x04" + value.encode()
    other = b"\x0a\x03url" + b"\x12\x05" + b"\x0a\x03" + b"\x0a\x01u"
    example = b"".join(
        b"\x0a" + bytes([len(e) & 127 | 128, len(e) >> 7]) + e for e in (other, entry)
    )
    example = b"\x0a" + bytes([len(example) & 127 | 128, len(example) >> 7]) + example
    assert bytes_feature(example, "text").decode() == value
    assert bytes_feature(example, "url") == b"u"
    with pytest.raises(ValueError, match="no feature 'txt'"):
        bytes_feature(example, "txt")


def test_crc32c_has_the_published_values():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(bytes([0xFF]) * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert masked_crc32c(b"") == 0xA282EAD8


def test_crc32c_does_not_depend_on_its_blocks():
    data = random.Random(1).randbytes(5000)

    def by_bits(data):
        state = 0xFFFFFFFF
        for byte in data:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
        return state ^ 0xFFFFFFFF

    for length in (0, 1, 3, 4, 5, 1023, 1024, 1025, 1027, 1028, 2048, 5000):
        assert crc32c(data[:length]) == by_bits(data[:length]), length


def test_the_pieces_of_a_plain_text_join_to_it(tmp_path):
    paragraphs = "\n\n".join("Text — on and on. " * (i % 60) for i in range(2000))
    huge_line = "€" * MAX_PIECE_BYTES
    (tmp_path / "a.txt").write_text(paragraphs)
    (tmp_path / "b.txt").write_text(huge_line)
    source = open_source(str(tmp_path / "*.txt"), "train")
    pieces = [source[i] for i in range(len(source))]
    assert "".join(piece.text for piece in pieces) == paragraphs + huge_line
    assert all(piece.is_valid_utf8 for piece in pieces)
    assert all(len(piece.text.encode()) <= MAX_PIECE_BYTES for piece in pieces)
    ends = [i for i, piece in enumerate(pieces) if piece.ends_document]
    assert len(ends) == 2
    assert pieces[ends[0]].text.endswith(paragraphs[-20:])
    assert all(piece.text.endswith("\n\n") for piece in pieces[: ends[0]])


def test_json_lines_without_text_are_skipped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"text": "a\\nb"}\n\nno\n[1]\n{"text": 5}\n{"text": "\xff"}\n{"text": "end"}'
    )
    source = open_source(str(path), "train")
    assert [source[i] for i in range(len(source))] == [
        Text("a\nb"),
        Text(""),
        Text("", is_malformed=True),
        Text("", is_malformed=True),
        Text("", is_malformed=True),
        Text("\ufffd", is_valid_utf8=False),
        Text("end"),
    ]


class WordTokenizer:
    """Like XLNet's it makes nothing of white space."""

    eos_id = 0

    def encode(self, text):
        return [len(word) for word in text.split()]


def test_a_plain_text_that_ends_in_white_space_keeps_its_eos(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 400 + "\n" * 3000)
    (tmp_path / "b.txt").write_text(" " * 3000)
    (tmp_path / "c.txt").write_text("the end\n")
    source = open_source(str(tmp_path / "*.txt"), "train")
    documents = [tokenize(source[i], WordTokenizer()) for i in range(len(source))]
    tokens = np.concatenate([document.tokens for document in documents]).tolist()
    assert len(source) > 3
    assert tokens in ([4] * 400 + [0] + [3, 3, 0], [4] * 400 + [0] + [0] + [3, 3, 0])
    assert not any(document.oddities for document in documents)


def test_files_can_be_sliced_into_training_and_validation(tmp_path):
    for name in "ab":
        lines = [json.dumps({"text": f"{name}{i}"}) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    pattern = str(tmp_path / "*.jsonl")
    train, validation = (open_source(pattern, s) for s in ("train[:75%]", "train[75%:]"))
    everything = texts_of(open_source(pattern, "train"))
    assert texts_of(train) + texts_of(validation) == everything
    assert len(validation) == 5
    assert texts_of(open_source(pattern, "train[-3:]")) == everything[-3:]
    assert texts_of(open_source(pattern, "train[10%:35%]")) == everything[2:7]


def test_a_folder_of_texts_is_read_like_its_files(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("notes.md", "left out")):
        (tmp_path / name).write_text(text)
    assert texts_of(open_source(str(tmp_path), "train")) == ["first", "second"]
    assert texts_of(open_source(f"{tmp_path}/", "train")) == ["first", "second"]


def test_validation_of_files_is_their_last_two_percent(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(200)))
    assert texts_of(open_source(str(path), "validation")) == ["196", "197", "198", "199"]
    assert texts_of(open_source(str(path), "validation[:50%]")) == ["196", "197"]
    assert texts_of(open_source(str(path), "validation[-1:]")) == ["199"]
    with pytest.raises(ValueError, match=r"no split 'test': files have train, .* and validation"):
        open_source(str(path), "test")


@pytest.mark.parametrize("paragraphs", [30, 300])
def test_two_percent_of_a_small_text_is_not_empty(tmp_path, paragraphs):
    path = tmp_path / "x.txt"
    path.write_text("Some words in a paragraph that has a few of them.\n\n" * paragraphs)
    train, validation = (open_source(str(path), s) for s in ("train[:98%]", "train[98%:]"))
    assert len(validation) == 1
    assert "".join(texts_of(train) + texts_of(validation)) == path.read_text()


def test_real_c4_pages_survive_the_way_through_both_formats(c4_pages, tmp_path):
    texts = [json.loads(line)["text"] for line in c4_pages[-30:]]
    splits = {"train": [Document(text) for text in texts]}
    arrays = write_dataset(
        splits, name="c4", config="en", version="3.0.1", data_dir=tmp_path, num_shards=2
    )
    to_tfrecord(arrays, tmp_path / "t")
    for folder in (arrays, tmp_path / "t"):
        assert sorted(texts_of(open_source(str(folder), "train"))) == sorted(texts)
