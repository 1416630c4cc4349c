"""The way from a text or a converted checkpoint to a model of one's own."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from reference_tensors import SMALL, random_tensors, write_hub_folder

from perceiver_ar_jax.commands import convert, tokenizer
from perceiver_ar_jax.presets import preset, presets
from perceiver_ar_jax.run_config import RunConfig
from perceiver_ar_jax.tokenizers import load_tokenizer

MODEL = SMALL.replace(vocab_size=262)  # bytes
TEXT = "The river runs past the house, and often the yellow boat sings.\n"


@pytest.mark.parametrize("name", sorted({*presets()} - {"finetune"}))
def test_every_preset_is_a_run(name):
    config = preset(name)
    config.data.source = config.data.source or "own.txt"
    RunConfig.from_config(config)


def test_the_tokenizer_command_writes_a_vocabulary_that_gives_the_text_back(tmp_path, capsys):
    output, licence = tmp_path / "mine.model", str(ROOT / "LICENSE")
    flags = [licence, "--vocab_size=400", f"--output={output}"]
    assert tokenizer.main(flags) == 0
    assert "400 ids" in capsys.readouterr().out
    trained = load_tokenizer(output)
    assert trained.decode(trained.encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        tokenizer.main(flags)
    with pytest.raises(ValueError, match="the text is enough for"):
        tokenizer.main([licence, "--vocab_size=9999", f"--output={tmp_path / 'more.model'}"])


def test_a_converted_model_is_fine_tuned_by_one_command(tmp_path):
    write_hub_folder(tmp_path / "hub", MODEL, random_tensors(MODEL))
    base = tmp_path / "base"
    flags = ["--output", str(base), "--tokenizer=bytes", "--verify=none"]
    assert convert.main([str(tmp_path / "hub"), *flags]) == 0
    (tmp_path / "own.txt").write_text(TEXT * 400)
    command = [sys.executable, ROOT / "train.py", f"--config=finetune:{base}", "--workdir=tuned"]
    done = subprocess.run(
        [*command, "--config.data.source=own.txt", "--config.steps=2", "--config.log_every=1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    tuned = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert tuned["model"]["num_channels"] == MODEL.num_channels
    assert tuned["run"]["init_from"] == str(base)
    assert tuned["tokenizer_sha256"]


def test_finetuning_what_was_not_converted_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="perceiver-ar convert makes one"):
        preset("finetune", str(tmp_path))
