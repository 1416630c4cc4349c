"""A model pushed to a stand-in of the Hugging Face hub, and what is saved on disk."""

import inspect
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from hub_cache import use_hub_cache, write_hub_cache
from small_models import random_params, small_config

from perceiver_ar_jax import PerceiverAR, load_pretrained
from perceiver_ar_jax.model import prepare_for_decoding
from perceiver_ar_jax.pretrained import Pretrained
from perceiver_ar_jax.tokenizers import ByteTokenizer

CONFIG = small_config(vocab_size=262)
REPOSITORY = "someone/small-ar"


@pytest.fixture(scope="module")
def pretrained():
    tokenizer = ByteTokenizer()
    return Pretrained(PerceiverAR(CONFIG), random_params(CONFIG), CONFIG, tokenizer, step=120)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the repository; calls must fit the real HfApi."""
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the [hub] extra")
    real, folder = huggingface_hub.HfApi, tmp_path / "repository"

    class StandIn:
        def __init__(self, **options):
            inspect.signature(real).bind(**options)

        def __getattr__(self, name):
            def call(*args, **kwargs):
                inspect.signature(getattr(real, name)).bind(self, *args, **kwargs)
                return getattr(self, f"on_{name}")(*args, **kwargs)

            return call

        def on_create_repo(self, repo_id, private, exist_ok):
            if repo_id != REPOSITORY:
                raise OSError("401 Client Error.\nInvalid username or password.")
            folder.mkdir(exist_ok=exist_ok)
            return f"https://huggingface.co/{repo_id}"

        def on_file_exists(self, repo_id, filename):
            return (folder / filename).exists()

        def on_upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, folder, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", StandIn)
    return folder


def assert_same_params(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_pushed_model_loads_by_its_id_and_its_card_describes_it(
    pretrained, hub, tmp_path, monkeypatch
):
    address = pretrained.push_to_hub(
        REPOSITORY, license="mit", evaluation={"bits per byte, own text": 1.23456}
    )
    assert address == f"https://huggingface.co/{REPOSITORY}"
    files = sorted(path.name for path in hub.iterdir())
    assert files == ["README.md", "config.json", "model.safetensors", "tokenizer_config.json"]
    use_hub_cache(monkeypatch, tmp_path / "hub")
    write_hub_cache(tmp_path / "hub", REPOSITORY, hub.iterdir())
    loaded = load_pretrained(REPOSITORY)
    assert_same_params(loaded.params, pretrained.params)
    assert loaded.tokenizer.sha256 == pretrained.tokenizer.sha256

    _, front, card = (hub / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "perceiver-ar-jax",
        "pipeline_tag": "text-generation",
        "tags": ["perceiver-ar", "jax", "flax"],
        "license": "mit",
    }
    size = sum(x.size for x in jax.tree.leaves(pretrained.params))
    for line in (
        f"| parameters | {size:,} |",
        "| positions it reads | 14, the last 6 as latents |",
        "| tokenizer | ByteTokenizer |",
        "| steps trained | 120 |",
        "| licence | mit |",
        "| bits per byte, own text | 1.235 |",
        f'pretrained = load_pretrained("{REPOSITORY}")',
    ):
        assert line in card.splitlines()


def test_a_card_that_is_there_is_kept_and_no_licence_is_made_up(pretrained, hub):
    pretrained.push_to_hub(REPOSITORY)
    card = (hub / "README.md").read_text()
    assert "\nlicense:" not in card
    assert "| licence | not stated |" in card
    assert "Evaluation" not in card
    (hub / "README.md").write_text("Mine.\n")
    pretrained.push_to_hub(REPOSITORY, license="mit")
    assert (hub / "README.md").read_text() == "Mine.\n"


def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(pretrained, hub):
    with pytest.raises(ValueError) as caught:
        pretrained.push_to_hub("no-owner")
    assert str(caught.value) == (
        "cannot push to no-owner: 401 Client Error; the id is owner/name, and you need to be "
        "logged in (hf auth login) or to pass a token that may write"
    )


def test_the_missing_extra_is_named(pretrained, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'perceiver-ar-jax\[hub\]'"):
        pretrained.push_to_hub(REPOSITORY)


def test_a_saved_model_loads_and_no_model_is_overwritten(pretrained, tmp_path):
    pretrained.save_pretrained(tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert_same_params(loaded.params, pretrained.params)
    assert loaded.config == CONFIG
    assert loaded.tokenizer("as ever") == ByteTokenizer().encode("as ever")
    with pytest.raises(ValueError, match=r"config\.json already: name another folder"):
        pretrained.save_pretrained(tmp_path / "model")


def test_weights_prepared_for_decoding_are_not_saved(pretrained, tmp_path):
    prepared = prepare_for_decoding(pretrained.params, "int8")
    prepared = Pretrained(pretrained.model, prepared, CONFIG, pretrained.tokenizer, 0)
    with pytest.raises(ValueError, match="cannot be saved: load_pretrained without `weights`"):
        prepared.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be pushed"):
        prepared.push_to_hub(REPOSITORY)
    assert not list(Path(tmp_path).iterdir())


def test_a_model_prints_on_one_line(pretrained):
    assert repr(pretrained) == (
        "Pretrained(11,094 parameters, max_seq_len=14, max_latents=6, vocab_size=262, "
        "tokenizer=ByteTokenizer, step=120)"
    )


def test_a_tokenizer_is_called_with_a_text_or_several():
    tokenizer = ByteTokenizer()
    assert tokenizer("ab") == tokenizer.encode("ab")
    assert tokenizer(["a", "bc"]) == [tokenizer.encode("a"), tokenizer.encode("bc")]
