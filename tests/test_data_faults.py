"""A bucket that misbehaves on purpose, read by gcsfs: batches stay the same."""

import itertools

import fsspec
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from gcsfs.core import GCSFileSystem

from perceiver_ar_jax.data import DataConfig, make_loader, storage, text_documents
from perceiver_ar_jax.data.prepare.tfds_writer import Document, write_dataset
from perceiver_ar_jax.tokenizers import ByteTokenizer
from tools.storage_server import RESET, SHORT, STALL, StorageServer

FAULTS = [429, 408, 500, 503, RESET, SHORT, STALL]
DATA = bytes(range(256)) * 1000


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts a server for the folders of `tmp_path`; waits are short."""
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(storage, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(storage, "_file_systems", {})
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    before = {name: fsspec.get_filesystem_class(name) for name in GCSFileSystem.protocol}
    for protocol in GCSFileSystem.protocol:
        fsspec.register_implementation(protocol, GCSFileSystem, clobber=True)
    forget_clients()
    storage.retries.take()
    running = []

    def start(fault):
        server = StorageServer(tmp_path, fault=fault)
        running.append(server.running())
        running[-1].__enter__()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        return server

    yield start
    for context in running:
        context.__exit__(None, None, None)
    forget_clients()
    for protocol, kind in before.items():
        fsspec.register_implementation(protocol, kind, clobber=True)


def forget_clients() -> None:
    """Other tests have an imitation of a bucket in their place."""
    GCSFileSystem.clear_instance_cache()
    fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def name(tmp_path) -> str:
    """A file in a bucket."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "data").write_bytes(DATA)
    return "gs://bucket/data"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_repaired_by_another_request_and_counted(serve, name, fault):
    serve(lambda number, path: fault if number < 2 else None)
    assert storage.read_range(name, 1000, 200_000) == DATA[1000:200_000]
    assert storage.retries.take() == 2
    assert storage.retries.take() == 0


@pytest.mark.parametrize("fault", [503, RESET, SHORT])
def test_what_stays_broken_is_one_line_that_names_the_object(serve, name, fault, monkeypatch):
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 3)
    server = serve(lambda number, path: fault)
    expected = r"^gs://bucket/data, byte 5: 3 attempts failed, the last with .+"
    with pytest.raises(storage.StorageError, match=expected) as caught:
        storage.read_range(name, 5, 100_000)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 75
    assert server.num_downloads == 3


@pytest.mark.parametrize("fault", [401, 403, 404])
def test_what_repeating_cannot_mend_is_not_repeated(serve, name, fault):
    server = serve(lambda number, path: fault)
    with pytest.raises(ValueError, match="cannot read gs://bucket/data"):
        storage.read_range(name, 0, 100)
    assert server.num_downloads == 1


def test_batches_are_the_same_with_and_without_faults(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(text_documents, "BLOCK_BYTES", (1 << 16,))
    monkeypatch.setattr(text_documents, "BLOCKS_PER_STREAM", 1)
    generator = np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(33, 90_000, size=3000))) for _ in range(80)]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    folder = write_dataset(
        {"train": [Document(text) for text in texts]},
        name="c4",
        config="en",
        version="3.0.1",
        data_dir=tmp_path / "bucket",
        num_shards=2,
    )
    kinds = itertools.cycle(FAULTS)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 30)
    server = serve(lambda number, path: next(kinds) if "train" in path and number % 3 else None)

    def batches(source):
        config = DataConfig(str(source), min_seq_len=2000, max_seq_len=4000, batch_size=4)
        loader = make_loader(config, ByteTokenizer())
        tokens = [batch["tokens"] for batch in itertools.islice(loader, 30)]
        loader.close()
        return tokens, loader.retries, loader.fingerprint

    expected, no_retries, here = batches(folder)
    found, retries, away = batches(f"gs://{folder.relative_to(tmp_path)}")
    np.testing.assert_array_equal(found, expected)
    assert here == away
    assert "block_bytes" in here
    assert no_retries == 0
    assert retries > 5
    assert server.num_downloads > retries
