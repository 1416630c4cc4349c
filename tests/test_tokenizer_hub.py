"""Tokenizers by their hub id, from a stand-in of the hub's cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cache import use_hub_cache, write_hub_cache

from perceiver_ar_jax.tokenizers import load_tokenizer, train_sentencepiece

pytest.importorskip("huggingface_hub", reason="needs the [hub] extra")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "spiece.model"
    texts = [f"The house number {i} sees another river, (as ever)." for i in range(100)]
    train_sentencepiece(texts, path, 290)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    use_hub_cache(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.parametrize("hub_id", ["xlnet-base-cased", "someone/small-ar"])
def test_a_hub_id_names_the_tokenizer_in_the_local_cache(hub_id, cache, model):
    write_hub_cache(cache, hub_id, [model])
    assert load_tokenizer(hub_id).sha256 == load_tokenizer(model).sha256


def test_xlnets_model_is_taken_from_among_the_hubs_files(cache, shared_data, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    spiece = shared_data / "xlnet" / "spiece.model"
    write_hub_cache(cache, "xlnet-base-cased", [spiece, tmp_path / "tokenizer.json"])
    tokenizer = load_tokenizer("xlnet-base-cased", vocab_size=32000)
    assert tokenizer.encode("café") == tokenizer.encode("cafe")  # as no plain SentencePiece has it


def test_another_models_tokenizer_json_is_preferred_to_its_spiece_model(cache, model, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    write_hub_cache(cache, "other", [model, tmp_path / "tokenizer.json"])
    assert load_tokenizer("other").vocab_size == 2


def test_a_fresh_process_finds_it_too(tmp_path, model):
    environment = write_hub_cache(tmp_path / "hub", "xlnet-base-cased", [model])
    code = (
        "from perceiver_ar_jax.tokenizers import load_tokenizer\n"
        "print(load_tokenizer('xlnet-base-cased').vocab_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("290\n", 0), done.stderr


def test_a_hub_id_that_cannot_be_loaded_is_reported_with_the_file_to_pass(cache):
    with pytest.raises(ValueError) as caught:
        load_tokenizer("xlnet-base-cased")
    line = str(caught.value)
    assert line.startswith("no tokenizer at xlnet-base-cased: it is not a file, and the Hugging")
    assert line.endswith("or pass the path of its spiece.model or tokenizer.json")
    assert "\n" not in line


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"pip install 'perceiver-ar-jax\[hub\]', or pass the path"
    ):
        load_tokenizer("xlnet-base-cased")


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("spiece.model", "x/tokenizer.json", "./xlnet", "/xlnet"):
        with pytest.raises(ValueError, match="expected a"):
            load_tokenizer(name)
