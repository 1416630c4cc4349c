"""Input that cannot be used is reported in one exact line, and nothing else."""

import re
import shutil
from pathlib import Path

import pytest
from small_models import random_params, small_config

from perceiver_ar_jax import load_pretrained
from perceiver_ar_jax.data import DataConfig, evaluation_batches, make_loader
from perceiver_ar_jax.data.prepare.tfds_convert import _write_tfrecord, to_tfrecord
from perceiver_ar_jax.data.prepare.tfds_writer import Document, write_dataset
from perceiver_ar_jax.data.record_files import tfrecords
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.pretrained import save_pretrained
from perceiver_ar_jax.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece

SPM_END = "(XLNet's spiece.model has 798011 bytes)"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 798011\n"
CASES = []


def answer(line):
    """A case: what it does in a folder `here`, and the exact line of the error."""

    def add(function):
        CASES.append(pytest.param(function, line, id=function.__name__))
        return function

    return add


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the same two shards as ArrayRecord in a/ and as TFRecord in t/."""
    folder = tmp_path_factory.mktemp("prepared")
    documents = {"train": [Document(f"document {i}") for i in range(20)]}
    options = {"name": "c4", "config": "en", "version": "3.0.1", "num_shards": 2}
    arrays = write_dataset(documents, data_dir=folder / "a", **options)
    to_tfrecord(arrays, folder / "t" / "c4" / "en" / "3.0.1")
    return folder


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCEIVER_AR_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(prepared, tmp_path / "here")


def cut(path: Path, size: int):
    path.write_bytes(path.read_bytes()[:size])


def texts_of(folder: Path):
    source = open_source(str(folder), "train")
    return [source[i].text for i in range(len(source))]


def first_batch(path: Path, **settings):
    config = DataConfig(source=str(path), min_seq_len=4, max_seq_len=8, batch_size=2, **settings)
    return next(make_loader(config, ByteTokenizer()))


# Data


@answer("no data at {here}/nowhere: it is not a folder or a file, and no glob that matches")
def data_directory_missing(here):
    first_batch(here / "nowhere")


@answer(
    "{here}/a/c4 is not a prepared TFDS directory (.../c4/en/3.0.1) and holds no .jsonl or .txt "
    "files: no dataset_info.json there; did you mean {here}/a/c4/en/3.0.1?"
)
def data_directory_a_level_too_high(here):
    first_batch(here / "a" / "c4")


@answer("{here}/a/c4/en/3.0.1 holds parquet files; array_record or tfrecord can be read")
def dataset_in_another_format(here):
    info = here / "a/c4/en/3.0.1/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "parquet"))
    first_batch(info.parent)


@answer("{here}/a/c4/en/3.0.1 has no split 'test': it has train")
def split_missing(here):
    first_batch(here / "a/c4/en/3.0.1", split="test")


@answer(
    "1 of 2 files are missing or empty, the first: "
    "{here}/a/c4/en/3.0.1/c4-train.array_record-00001-of-00002"
)
def array_record_empty(here):
    cut(here / "a/c4/en/3.0.1/c4-train.array_record-00001-of-00002", 0)
    first_batch(here / "a/c4/en/3.0.1")


@answer(
    "{here}/a/c4/en/3.0.1/c4-train.array_record-00001-of-00002 (1,000 bytes) is a damaged "
    "ArrayRecord file: no records, truncated or empty"
)
def array_record_truncated(here):
    cut(here / "a/c4/en/3.0.1/c4-train.array_record-00001-of-00002", 1000)
    texts_of(here / "a/c4/en/3.0.1")


@answer(
    "{here}/t/c4/en/3.0.1/c4-train.tfrecord-00001-of-00002 (200 bytes) is a damaged TFRecord file: "
    "cut off after byte 154"
)
def tfrecord_truncated(here):
    cut(here / "t/c4/en/3.0.1/c4-train.tfrecord-00001-of-00002", 200)
    texts_of(here / "t/c4/en/3.0.1")


@answer(
    "{here}/t/c4/en/3.0.1/c4-train.tfrecord-00001-of-00002, record 0: an example has no "
    "feature 'text'"
)
def dataset_without_text(here):
    shard = here / "t/c4/en/3.0.1/c4-train.tfrecord-00001-of-00002"
    records = [record.replace(b"text", b"body") for record in tfrecords(str(shard))]
    _write_tfrecord(str(shard), records)
    texts_of(here / "t/c4/en/3.0.1")


@answer("{here}/x.jsonl has no documents in train[:0]")
def no_documents(here):
    (here / "x.jsonl").write_text('{"text": "x"}\n')
    first_batch(here / "x.jsonl", split="train[:0]")


@answer(
    '1000 documents in a row hold no text (JSON lines hold it under the key "text")',
)
def documents_without_text(here):
    (here / "x.jsonl").write_text('{"content": "x"}\n')
    first_batch(here / "x.jsonl")


@answer("{here}/x.jsonl has no text in train")
def nothing_to_evaluate_on(here):
    (here / "x.jsonl").write_text('{"text": ""}')
    config = DataConfig(source=str(here / "x.jsonl"), max_seq_len=8, min_seq_len=1)
    evaluation_batches(config, ByteTokenizer(), num_latents=2)


# Tokenizers


@answer('no tokenizer at {here}/spiece.model: expected a SentencePiece .model file or "bytes"')
def tokenizer_missing(here):
    load_tokenizer(here / "spiece.model")


@answer(
    "no tokenizer in {here}: looked for spiece.model, tokenizer.json and a tokenizer_config.json "
    "that names PerceiverTokenizer"
)
def tokenizer_missing_in_a_folder(here):
    load_tokenizer(here)


@answer(
    "{here}/spiece.model (21 bytes) is not a SentencePiece model, it is an HTML page: the download "
    "went wrong " + SPM_END
)
def tokenizer_is_a_web_page(here):
    (here / "spiece.model").write_bytes(b"<!DOCTYPE html><html>")
    load_tokenizer(here / "spiece.model")


@answer(
    "{here}/spiece.model (68 bytes) is not a SentencePiece model, it is a Git LFS pointer to a "
    "file of 798011 bytes: run `git lfs pull` " + SPM_END
)
def tokenizer_is_a_git_lfs_pointer(here):
    (here / "spiece.model").write_bytes(LFS_POINTER)
    load_tokenizer(here / "spiece.model")


@answer(
    "{here}/spiece.model (16 bytes) is not a SentencePiece model, it begins with "
    "b'PK\\x03\\x04 not a model' " + SPM_END
)
def tokenizer_is_something_else(here):
    (here / "spiece.model").write_bytes(b"PK\x03\x04 not a model")
    load_tokenizer(here / "spiece.model")


@answer("tokenizer bytes has 262 ids, the model's vocabulary only 256")
def tokenizer_with_a_larger_vocabulary(here):
    load_tokenizer("bytes", vocab_size=256)


@answer(
    "{here}/model/tokenizer is not the tokenizer this model was trained with: "
    "sha256 ………, " + ByteTokenizer.sha256[:12] + "… expected"
)
def tokenizer_other_than_the_checkpoints(here):
    config = small_config(vocab_size=300, num_self_attention_layers=0)
    save_pretrained(here / "model", config, random_params(config), tokenizer=ByteTokenizer())
    texts = [f"The house number {i} sees another river, (as ever)." for i in range(100)]
    train_sentencepiece(texts, here / "model" / "tokenizer" / "spiece.model", 290)
    load_pretrained(here / "model")


@answer("token id 262 at position 1 is outside 0..261")
def token_id_beyond_the_vocabulary(here):
    ByteTokenizer().decode([7, 262])


@answer("token id -1 at position 0 is outside 0..261")
def token_id_negative(here):
    ByteTokenizer().decode([-1])


@pytest.mark.parametrize(("use", "line"), CASES)
def test_bad_input_is_answered_with_one_line(use, line, here):
    with pytest.raises(ValueError) as caught:
        use(here)
    found = re.sub(r"sha256 \w{12}…", "sha256 ………", str(caught.value))
    assert found == line.replace("{here}", str(here))


def test_tfrecord_needs_no_conversion(prepared):
    assert sorted(texts_of(prepared / "t/c4/en/3.0.1")) == sorted(
        f"document {i}" for i in range(20)
    )


def test_plain_text_with_nul_and_bad_utf8_is_read_on_and_counted(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"nul \0 and caf\xe9, then on")
    config = DataConfig(
        source=str(tmp_path / "x.txt"), min_seq_len=64, max_seq_len=64, batch_size=1, repeat=False
    )
    loader = make_loader(config, ByteTokenizer())
    batch = next(loader)
    assert ByteTokenizer().decode(batch["tokens"][0]) == "nul \0 and caf\ufffd, then on"
    assert loader.oddities == {"bad UTF-8": 1, "malformed line": 0, "empty document": 0}
