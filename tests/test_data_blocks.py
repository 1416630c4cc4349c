"""Blocks of consecutive records: read without an index, every record once, exact on resume."""

import base64
import collections
import itertools
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from perceiver_ar_jax.data import DataConfig, evaluation_batches, make_loader, text_documents
from perceiver_ar_jax.data.crc32c import masked_crc32c
from perceiver_ar_jax.data.highway_hash import highway_hash
from perceiver_ar_jax.data.prepare.tfds_convert import to_tfrecord
from perceiver_ar_jax.data.prepare.tfds_writer import Document, write_dataset
from perceiver_ar_jax.data.record_blocks import Span, read_array_records, read_tfrecords
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.data.text_blocks import TextBlocks
from perceiver_ar_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
KIB_64 = 1 << 16
FORMATS = ["array_record", "tfrecord"]
READ = {"array_record": read_array_records, "tfrecord": read_tfrecords}


def random_text(i: int) -> str:
    """Hard to compress, of very different lengths, one longer than a block."""
    generator = random.Random(i)
    length = 150_000 if i == 30 else generator.choice([0, 10, 500, 3000, 20_000])
    return f"{i}:" + base64.b64encode(generator.randbytes(length)).decode()


TEXTS = [random_text(i) for i in range(200)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("c4")
    splits = {"train": [Document(text) for text in TEXTS]}
    options = {"name": "c4", "config": "en", "version": "3.0.1", "num_shards": 3}
    arrays = write_dataset(splits, data_dir=folder / "a", **options)
    to_tfrecord(arrays, folder / "t" / "c4" / "en" / "3.0.1")
    return {"array_record": arrays, "tfrecord": folder / "t" / "c4" / "en" / "3.0.1"}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(text_documents, "BLOCK_BYTES", (KIB_64,))
    monkeypatch.setattr(text_documents, "BLOCKS_PER_STREAM", 1)


def records_of(path: Path, read, block_bytes: int = KIB_64) -> list[bytes]:
    size = path.stat().st_size
    starts = range(0, size, block_bytes)
    spans = [Span(str(path), start, min(start + block_bytes, size), size) for start in starts]
    return list(itertools.chain.from_iterable(map(read, spans)))


def write_array_record(path: Path, options: str, records: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def write_tfrecord(path: Path, records: list[bytes]) -> None:
    def number(value, size):
        return value.to_bytes(size, "little")

    with path.open("wb") as file:
        for record in records:
            length = number(len(record), 8)
            file.write(length + number(masked_crc32c(length), 4))
            file.write(record + number(masked_crc32c(record), 4))


@pytest.mark.parametrize(
    "options, lengths, count",
    [
        ("group_size:1", [0, 1, 50, 3000, 70_000, 200_000], 60),
        ("group_size:64", [0, 1, 2, 50, 3000], 1001),
        ("group_size:1000,uncompressed", [0], 200_001),  # positions follow the numbers of records
        ("group_size:7,brotli:3", [50, 3000], 301),
        ("group_size:7,transpose,snappy", [50, 3000], 301),
        ("group_size:1,pad_to_block_boundary:true", [5, 5000], 20),
    ],
)
def test_the_blocks_of_an_array_record_hold_each_record_once(tmp_path, options, lengths, count):
    generator = random.Random(0)
    records = [generator.randbytes(generator.choice(lengths)) for _ in range(count)]
    path = tmp_path / "x.array_record"
    write_array_record(path, options, records)
    for block_bytes in (KIB_64, 4 * KIB_64):
        assert records_of(path, read_array_records, block_bytes) == records


def test_the_blocks_of_a_tfrecord_file_hold_each_record_once(tmp_path):
    generator = random.Random(0)
    lengths = [generator.choice([0, 1, 8, 100, 5000, 150_000]) for _ in range(100)]
    records = [generator.randbytes(length) for length in lengths]
    records += [bytes(2000), *[b"\xff" * 100] * 3]  # zeros look like the lengths of records
    path = tmp_path / "x.tfrecord"
    write_tfrecord(path, records)
    for block_bytes in (KIB_64, 4 * KIB_64):
        assert records_of(path, read_tfrecords, block_bytes) == records


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_flipped_bit_in_a_block_is_never_read_as_text(prepared, file_format, tmp_path):
    (path, *_) = sorted(prepared[file_format].glob("*-train.*"))
    data = path.read_bytes()
    expected = records_of(path, READ[file_format])
    generator = random.Random(1)
    places = [8, 70, 90, KIB_64 + 3, KIB_64 + 20, 2 * KIB_64 + 10]
    places += [generator.randrange(len(data) - KIB_64) for _ in range(30)]
    caught = 0
    for number, place in enumerate(places):
        broken = tmp_path / f"{number}.{file_format}"
        flipped = bytes([data[place] ^ (1 << generator.randrange(8))])
        broken.write_bytes(data[:place] + flipped + data[place + 1 :])
        try:
            assert records_of(broken, READ[file_format]) == expected  # what nobody reads
        except ValueError as error:
            assert broken.name in str(error)
            assert "\n" not in str(error)
            caught += 1
    assert caught >= (len(places) if file_format == "tfrecord" else len(places) // 2)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("size", [100, 70_000, 150_000])
def test_a_truncated_file_is_named_by_the_reader_of_its_blocks(
    prepared, file_format, size, tmp_path
):
    (path, *_) = sorted(prepared[file_format].glob("*-train.*"))
    broken = tmp_path / path.name
    broken.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=path.name):
        records_of(broken, READ[file_format])


def test_highway_hash_has_riegelis_values(prepared):
    """The hashes that ArrayRecord's writer stored, of 16, 32 and many bytes."""
    (path, *_) = sorted(prepared["array_record"].glob("*-train.*"))
    postscript = path.read_bytes()[-KIB_64:]

    def number(begin):
        return int.from_bytes(postscript[begin : begin + 8], "little")

    assert highway_hash(postscript[8:24]) == number(0)
    assert highway_hash(postscript[32:64]) == number(24)
    assert highway_hash(postscript[64 : 64 + number(32)]) == number(40)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("split", ["train", "train[10:31]", "train[-5:]", "train[:99%]"])
def test_blocks_of_a_split_hold_its_texts(prepared, file_format, split):
    source = open_source(str(prepared[file_format]), split)
    expected = [source[i] for i in range(len(source))]
    blocks = pickle.loads(pickle.dumps(TextBlocks(source, KIB_64)))
    texts = itertools.chain.from_iterable(map(blocks.read, range(len(blocks))))
    assert [text.text for text in texts] == [text.text for text in expected]


def test_a_file_with_fewer_records_than_expected_is_refused(prepared, tmp_path):
    for path in prepared["tfrecord"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    (train,) = (split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"][-1] = "1000"
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    source = open_source(str(tmp_path), "train[-5:]")
    with pytest.raises(ValueError, match=r"00002-of-00003 has 67 records, 1000 were expected"):
        TextBlocks(source, KIB_64)


def config(source, **changes) -> DataConfig:
    defaults = {"min_seq_len": 900, "max_seq_len": 1000, "batch_size": 4, "seed": 3}
    return DataConfig(source=str(source), **(defaults | changes))


def count_documents(batches) -> collections.Counter:
    """How often the number at the beginning of each text occurs."""
    found = collections.Counter()
    rows = collections.defaultdict(list)
    for batch in batches:
        for row, is_pad in enumerate(batch["pad_mask"]):
            if not is_pad.all():
                rows[row] += batch["tokens"][row][~is_pad].tolist()
                rows[row].append(int(batch["targets"][row][-1]))
    for tokens in rows.values():
        tokens = tokens if tokens[-1] == BYTES.eos_id else [*tokens, BYTES.eos_id]
        text = "".join("\n" if t == BYTES.eos_id else chr(t - 6) for t in tokens)
        found.update(text.splitlines())
    return found


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("process_count", [1, 2])
def test_processes_together_read_every_document_of_the_blocks_once(
    prepared, file_format, process_count
):
    found = collections.Counter()
    settings = config(prepared[file_format], repeat=False, batch_size=4 // process_count)
    for process in range(process_count):
        loader = make_loader(settings, BYTES, process_index=process, process_count=process_count)
        assert loader.fingerprint["block_bytes"] == KIB_64
        found += count_documents(loader)
        loader.close()
    assert found == collections.Counter(TEXTS)


@pytest.mark.usefixtures("small_blocks")
def test_a_loader_of_blocks_resumes_from_any_batch(prepared):
    settings = config(prepared["array_record"], min_seq_len=5000, max_seq_len=20_000)
    loader = make_loader(settings, BYTES)
    states, batches = [loader.get_state()], []
    for batch in itertools.islice(loader, 30):
        batches.append(batch["tokens"])
        states.append(loader.get_state())
    loader.close()
    assert max(block for block, *_ in states[-1]["positions"]) > 3
    assert max(document for _, document, _ in states[-1]["positions"]) > 0
    for cut in range(0, 30, 3):
        resumed = make_loader(settings, BYTES)
        resumed.set_state(json.loads(json.dumps(states[cut])))
        np.testing.assert_array_equal(next(resumed)["tokens"], batches[cut])
        assert resumed.get_state() == states[cut + 1]
        resumed.close()


@pytest.mark.usefixtures("small_blocks")
def test_each_epoch_has_its_own_order_of_blocks(prepared):
    settings = config(prepared["tfrecord"], min_seq_len=20_000, max_seq_len=20_000, batch_size=1)
    loader = make_loader(settings, BYTES)
    text = ""
    while text.count("\n") < 2 * len(TEXTS):
        (tokens,) = next(loader)["tokens"]
        text += "".join("\n" if t == BYTES.eos_id else chr(t - 6) for t in tokens)
    loader.close()
    texts = text.split("\n")
    first, second = texts[: len(TEXTS)], texts[len(TEXTS) : 2 * len(TEXTS)]
    assert len(set(first)) == len(set(second)) == len(TEXTS)
    assert first != second


def test_a_small_dataset_is_shuffled_by_document(prepared):
    loader = make_loader(config(prepared["array_record"], batch_size=64), BYTES)
    assert "block_bytes" not in loader.fingerprint


def test_evaluation_reads_the_documents_in_their_order(prepared):
    source = open_source(str(prepared["array_record"]), "train[5:40]")
    joined = "".join(source[i].text + "\n" for i in range(len(source)))
    settings = config(prepared["array_record"], split="train[5:40]", max_seq_len=1000)
    batches = evaluation_batches(settings, BYTES, num_latents=1000)
    text = ""
    for batch in batches:
        counted = batch["targets"][batch["weights"] > 0]
        text += "".join("\n" if t == BYTES.eos_id else chr(t - 6) for t in counted)
    assert text == joined
