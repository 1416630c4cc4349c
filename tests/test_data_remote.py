"""gs:// paths, against a bucket in memory; ArrayRecord's own client, against a local server."""

import json
import pickle
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from perceiver_ar_jax import PerceiverARConfig
from perceiver_ar_jax.data import DataConfig, make_loader
from perceiver_ar_jax.data.prepare.tfds_convert import to_tfrecord
from perceiver_ar_jax.data.prepare.tfds_writer import Document, write_dataset
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece
from perceiver_ar_jax.training.goodput import Goodput
from perceiver_ar_jax.training.metrics import MetricsWriter
from perceiver_ar_jax.training.timeline import Timeline
from perceiver_ar_jax.workdir import changed_settings, write_run

TEXTS = [f"document {i} " * (i + 1) for i in range(20)]


class Bucket(MemoryFileSystem):
    """What gcsfs is to Google's storage."""

    protocol = ("gcs", "gs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(re.sub(r"^\w+://", "", str(path)))


class Storage(BaseHTTPRequestHandler):
    """Serves the bucket's files whole or in ranges, as Google's JSON API does."""

    def do_GET(self):
        name = unquote(self.path.split("?")[0].split("/b/")[1]).replace("/o/", "/", 1)
        data = Bucket().cat(name)
        begin, end = 0, len(data)
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = found.groups()
            begin = int(first) if first else max(0, end - int(last))
            end = min(end, int(last) + 1) if first and last else end
        self.send_response(206)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[begin:end])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    options = {"name": "c4", "config": "en", "version": "3.0.1", "num_shards": 2}
    documents = {"train": [Document(text) for text in TEXTS]}
    arrays = write_dataset(documents, data_dir=folder / "a", **options)
    to_tfrecord(arrays, folder / "t" / "c4" / "en" / "3.0.1")
    for i in range(2):
        lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[i::2])
        (folder / f"part{i}.jsonl").write_text("".join(lines))
    train_sentencepiece(TEXTS, folder / "spiece.model", 280)
    return folder


@pytest.fixture
def bucket(local, tmp_path, monkeypatch):
    """The same files at gs://bucket/."""
    monkeypatch.setenv("PERCEIVER_AR_CACHE", str(tmp_path / "cache"))
    before = fsspec.get_filesystem_class("gcs")
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    for path in local.rglob("*"):
        if path.is_file():
            Bucket().pipe(f"gs://bucket/{path.relative_to(local)}", path.read_bytes())
    yield "gs://bucket"
    Bucket.store.clear()
    fsspec.register_implementation("gcs", before, clobber=True)  # other tests have another server


@pytest.fixture
def storage(bucket, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
    yield bucket
    server.shutdown()
    thread.join()
    server.server_close()


def texts_of(source) -> list[str]:
    return [source[i].text for i in range(len(source))]


def test_tfrecords_and_json_lines_are_read_from_a_bucket(bucket, local):
    for place in ("t/c4/en/3.0.1", "part0.jsonl", "part*.jsonl"):
        remote = open_source(f"{bucket}/{place}", "train[:9]")
        assert texts_of(remote) == texts_of(open_source(f"{local}/{place}", "train[:9]"))
        assert texts_of(pickle.loads(pickle.dumps(remote))) == texts_of(remote)


def test_a_dataset_of_a_bucket_is_found_by_its_name(bucket, local, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", f"{bucket}/t")
    for name in ("c4/en:3.0.1", "c4"):
        assert texts_of(open_source(name, "train")) == texts_of(
            open_source(f"{local}/t/c4/en/3.0.1", "train")
        )
    with pytest.raises(
        ValueError, match=r"gs://bucket/t/c4/en/1.0.0 is not there .* has c4/en:3.0"
    ):
        open_source("c4/en:1.0.0", "train")


def test_array_records_are_read_from_a_bucket(storage, local):
    remote = open_source(f"{storage}/a/c4/en/3.0.1", "train")
    assert texts_of(remote) == texts_of(open_source(f"{local}/a/c4/en/3.0.1", "train"))


def test_batches_do_not_depend_on_where_the_files_are(bucket, local):
    def batch(folder):
        config = DataConfig(f"{folder}/part*.jsonl", min_seq_len=8, max_seq_len=16)
        return next(make_loader(config, ByteTokenizer()))["tokens"].tolist()

    assert batch(bucket) == batch(local)


def test_a_tokenizer_is_read_from_a_bucket_and_saved_to_one(bucket, local):
    expected = load_tokenizer(local / "spiece.model")
    expected.save(f"{bucket}/saved")
    for place in (f"{bucket}/spiece.model", f"{bucket}/saved"):
        found = pickle.loads(pickle.dumps(load_tokenizer(place)))
        assert (found.sha256, found.encode(TEXTS[3])) == (
            expected.sha256,
            expected.encode(TEXTS[3]),
        )


def test_missing_data_is_named_by_its_address(bucket):
    with pytest.raises(ValueError, match="no data at gs://bucket/nowhere: "):
        open_source("gs://bucket/nowhere", "train")
    with pytest.raises(ValueError, match=r"no tokenizer at gs://bucket/x\.model: "):
        load_tokenizer("gs://bucket/x.model")


def test_what_a_run_writes_besides_checkpoints_may_go_to_a_bucket(bucket):
    workdir = epath.Path("gs://bucket/run")
    tokenizer = ByteTokenizer()
    workdir.mkdir(parents=True)
    run = {"steps": 1, "data": {"respect_documents": False}}
    assert changed_settings(workdir, run) == []
    write_run(workdir, PerceiverARConfig(), tokenizer, run)
    assert changed_settings(workdir, run | {"steps": 2}) == ["steps: 1 -> 2"]
    for step in (1, 2):  # two starts of one run
        writer = MetricsWriter(workdir)
        writer.write(step, {"train/loss": 2.5})
        writer.close()
        goodput = Goodput(workdir / "goodput.json", Timeline(), step=step, productive=0.0)
        assert goodput.metrics(step)["perf/lost_steps"] == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert goodput.starts == 2
    events = [file.read_bytes() for file in (workdir / "tensorboard").iterdir()]
    assert events and all(b"train/loss" in data for data in events)
