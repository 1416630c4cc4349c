"""Runs that are killed again and again are bit-identical to uninterrupted ones."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from small_runs import write_text

sys.path.append(str(ROOT / "tools"))

import torture


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--kills=5"], {"data.num_workers": 2, "optimizer.skip_spikes": True}),
        (["--kills=2", "--processes=2", "--devices=2"], {"mesh.fsdp": 2, "data.num_workers": 0}),
        pytest.param(
            ["--kills=1", "--processes=4", "--lose_one"],
            {"mesh.fsdp": 2, "steps": 16, "lost_after": 10, "model.num_self_attention_layers": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(["--kills=100"], {"steps": 400, "ema_decay": 0.9}, marks=pytest.mark.slow),
    ],
    ids=["one process", "two processes of two devices", "one of four is lost", "a hundred kills"],
)
def test_kills_leave_no_trace_in_the_bits(options, settings, tmp_path):
    settings = {
        "data.source": write_text(tmp_path),
        "steps": 60,
        "checkpoint_every": 4,
        "eval_every": 30,
        "model.residual_dropout": 0.1,
        "sample.max_new_tokens": 2,
    } | settings
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = ["tools/torture.py", f"--workdir={tmp_path / 'runs'}", *options, "--"]
    done = subprocess.run(
        [sys.executable, *command, "--config=configs/tiny.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same_bits"]
    assert result["steps"] == settings["steps"]
    assert f"--kills={result['kills']}" in options


def test_a_stuck_run_is_ended_and_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text("import time; print('begins', flush=True); time.sleep(999)")
    monkeypatch.setattr(torture, "ROOT", tmp_path)
    workdir = tmp_path / "runs"
    flags = [f"--workdir={workdir}", "--stuck_after=1", "--processes=2", "--", "-v"]
    monkeypatch.setattr(sys, "argv", ["torture.py", *flags])
    assert torture.main() == 1
    assert f"wrote nothing for 1 s after step 0; see {workdir}" in capsys.readouterr().err
