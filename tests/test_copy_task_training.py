"""The copy task from its config to its accuracy."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from small_runs import metrics, train

from perceiver_ar_jax import train_loop
from perceiver_ar_jax.presets import preset


def tiny_copy(**changes):
    """Bytes a b c d, then d c b a; c, b, a and eos are predicted."""
    config = preset("copy", "8")
    config.steps = config.eval_every = config.checkpoint_every = 60
    config.batch_size = 256
    config.log_every = 20
    config.optimizer.warmup_steps = 10
    config.optimizer.min_fraction = 1.0
    config.optimizer.learning_rate = 5e-3
    config.sample.max_new_tokens = 1
    config.model.num_channels = 64
    config.model.num_heads = 2
    config.update(changes)
    return config


def accuracy(model, monkeypatch, capsys, *flags) -> dict:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "copy_accuracy.py"
    spec = importlib.util.spec_from_file_location("copy_accuracy", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["copy_accuracy.py", f"--model={model}", *flags])
    capsys.readouterr()
    script.main()
    return json.loads(capsys.readouterr().out)


def test_a_small_model_learns_to_copy_and_its_accuracy_is_measured(tmp_path, monkeypatch, capsys):
    assert train(tiny_copy(), tmp_path) == train_loop.DONE
    first, last = (line["eval/loss"] for line in metrics(tmp_path) if "eval/loss" in line)
    assert last < 0.3 < 5 < first
    found = accuracy(tmp_path, monkeypatch, capsys)
    assert found["task"] == "mirror:8" and found["documents"] == 2**12
    assert found["accuracy"] > 0.99 and found["eos_accuracy"] > 0.99
    assert list(found["accuracy_by_distance"]) == ["3..3", "5..5", "7..7"]
    other = accuracy(tmp_path, monkeypatch, capsys, "--task=repeat:8")
    assert other["eos_accuracy"] > 0.99 and other["accuracy_by_distance"]["4..4"] < 0.1


@pytest.mark.parametrize(
    ("positions", "num_latents", "shortest"),
    [("32", 16, 32), ("128", 64, 128), ("4096", 512, 2560), ("131072", 512, 66048)],
)
def test_all_latents_of_every_window_of_the_config_count(positions, num_latents, shortest):
    config = preset("copy", positions)
    assert config.model.max_latents == num_latents
    assert config.data.min_seq_len == shortest == int(positions) // 2 + num_latents
