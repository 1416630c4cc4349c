"""Datasets by the names that TFDS gives them."""

import shutil

import pytest

from perceiver_ar_jax.data import DataConfig, make_loader
from perceiver_ar_jax.data.prepare.tfds_writer import Document, write_dataset
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """c4/en in two versions, of 3 and 5 documents."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    for version, count in (("2.9.0", 3), ("2.10.0", 5)):
        documents = {"train": [Document(f"document {i}") for i in range(count)]}
        options = {"name": "c4", "config": "en", "version": version, "num_shards": 1}
        write_dataset(documents, data_dir=folder, **options)
    return folder


@pytest.fixture(autouse=True)
def variable(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


@pytest.mark.parametrize(
    "name, count",
    [("c4/en:2.9.0", 3), ("c4/en:2.10.0", 5), ("c4/en", 5), ("c4", 5), ("c4:2.9.0", 3)],
)
def test_a_name_finds_what_tfds_prepared(name, count):
    assert len(open_source(name, "train")) == count


def test_the_default_folder_is_that_of_tfds(data_dir, monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(data_dir, tmp_path / "tensorflow_datasets")
    assert len(open_source("c4/en:2.9.0", "train")) == 3


def test_a_run_may_resume_with_the_same_data_elsewhere(data_dir):
    lengths = {"min_seq_len": 4, "max_seq_len": 8}
    by_name = make_loader(DataConfig("c4/en:2.9.0", **lengths), ByteTokenizer())
    by_path = make_loader(DataConfig(str(data_dir / "c4/en/2.9.0"), **lengths), ByteTokenizer())
    by_path.set_state(by_name.get_state())


def test_a_file_or_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text("a text")
    assert open_source("c4", "train")[0].text == "a text"


def test_a_missing_dataset_is_reported_with_folder_and_command(data_dir, monkeypatch, tmp_path):
    with pytest.raises(ValueError) as caught:
        open_source("c4/en:3.0.1", "train")
    assert str(caught.value) == (
        f"no data at c4/en:3.0.1: it is neither a file nor a folder, and {data_dir}/c4/en/3.0.1 is "
        f"not there either ($TFDS_DATA_DIR; {data_dir} has c4/en:2.10.0, c4/en:2.9.0). Prepare it "
        f"with: tfds build c4/en:3.0.1 --data_dir={data_dir} --file_format=array_record"
    )
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{tmp_path}/tensorflow_datasets/pg19 .* is not set\)"):
        open_source("pg19", "train")


def test_an_ambiguous_name_is_refused(data_dir, monkeypatch, tmp_path):
    for config in ("en", "webtextlike"):
        shutil.copytree(data_dir / "c4/en/2.9.0", tmp_path / "c4" / config / "2.9.0")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"c4 may mean c4/en:2\.9\.0 or c4/webtextlike:2\.9\.0"):
        open_source("c4", "train")
    assert len(open_source("c4/webtextlike", "train")) == 3
