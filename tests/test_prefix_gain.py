"""The benchmark of what a longer prefix is worth, and its picture."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DRAW = ROOT / "tools" / "draw_prefix_gain.py"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as environment:
        environment.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("prefix_gain")


def test_no_training_target_is_held_out_and_every_held_out_one_is_predicted_once(benchmark):
    starts_W, is_held_out_T = benchmark.hold_out(20_000, latents=8, longest=100)
    args = argparse.Namespace(latents=8, shared_steps=100, steps=100, batch=4, seed=0)
    drawn = benchmark.draw_starts(args, is_held_out_T, 100)
    places = np.arange(20_000)
    predicted = benchmark.window_batch(places, starts_W, 0, 8).targets
    np.testing.assert_array_equal(np.sort(predicted.ravel()), np.flatnonzero(is_held_out_T))
    assert 0.04 < is_held_out_T.mean() < 0.07
    trained = benchmark.window_batch(places, drawn.ravel(), 0, 8).targets
    assert not is_held_out_T[trained].any()
    assert drawn.shape == (200, 4) and drawn.min() >= 100


def test_a_longer_prefix_changes_what_is_read_and_not_what_is_predicted(benchmark):
    places, starts = np.arange(100), np.array([40, 60])
    short, long = (benchmark.window_batch(places, starts, prefix, 8) for prefix in (0, 16))
    np.testing.assert_array_equal(short.targets, long.targets[:, 16:])
    np.testing.assert_array_equal(long.tokens[0], np.arange(24, 48))
    np.testing.assert_array_equal(long.targets, long.tokens + 1)


def test_the_benchmark_writes_what_the_picture_draws(benchmark, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("a text that goes on and on. " * 60)
    sizes = ["--latents=16", "--channels=16", "--layers=1", "--batch=2", "--prefixes", "0", "32"]
    steps = ["--shared_steps=2", "--steps=1"]
    output = tmp_path / "gain.json"
    flags = [f"--text={text}", f"--output={output}", *sizes, *steps]
    monkeypatch.setattr(sys, "argv", ["prefix_gain.py", *flags])
    benchmark.main()
    result = json.loads(output.read_text())
    none, longer = result["models"]
    assert [read["prefix"] for read in none["read"]] == [0]
    assert [read["prefix"] for read in longer["read"]] == [0, 32]
    for read in longer["read"]:
        assert len(read["by_part"]) == 8
        assert read["loss"] == pytest.approx(np.mean(read["by_part"]), abs=1e-3)
    gain = longer["read"][0]["loss"] - longer["read"][1]["loss"]
    assert longer["read"][1]["gain"][0] == pytest.approx(gain, abs=2e-4)
    picture = tmp_path / "gain.svg"
    command = [sys.executable, DRAW, output, f"--output={picture}"]
    assert subprocess.run(command, timeout=120).returncode == 0
    assert f"{longer['read'][1]['loss']:.3f}" in picture.read_text()


def test_a_file_of_something_else_gets_one_line(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    for path, words in ((other, "is not what benchmarks/prefix_gain.py"), (tmp_path / "x", "x")):
        found = subprocess.run([sys.executable, DRAW, path], capture_output=True, text=True)
        assert found.returncode == 2 and words in found.stderr
        assert found.stderr.startswith("draw_prefix_gain.py: ") and found.stderr.count("\n") == 1


def test_a_text_that_is_too_short_is_refused(benchmark):
    with pytest.raises(SystemExit, match="1,000 tokens is too short for a prefix of 900"):
        benchmark.hold_out(1000, latents=8, longest=900)
