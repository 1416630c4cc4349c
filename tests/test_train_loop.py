import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import losses, metrics, small_run, train, write_text

from perceiver_ar_jax import load_pretrained, train_loop
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.training.checkpoint import CheckpointError
from perceiver_ar_jax.workdir import claimed

# Where one array of a checkpoint is damaged, TensorStore drops the reads of the others.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("straight")
    assert train(small_run(text), workdir) == train_loop.DONE
    return workdir


def test_a_run_learns_and_leaves_its_files(straight):
    evals = [line["eval/loss"] for line in metrics(straight) if "eval/loss" in line]
    assert len(evals) == 3
    assert evals[-1] < evals[0]
    for name in ("config.json", "env.json", "tokenizer", "tensorboard", "samples", "checkpoints"):
        assert (straight / name).exists()
    line = next(line for line in metrics(straight) if "train/loss" in line)
    assert {
        "step",
        "train/loss",
        "optim/learning_rate",
        "optim/grad_norm",
        "perf/step_ms",
        "perf/tokens_per_sec",
        "perf/trained_tokens_per_sec",
        "data/wait_share",
        "data/retries",
    } <= line.keys()


def test_load_pretrained_reads_a_workdir(straight):
    pretrained = load_pretrained(straight)
    assert pretrained.step == 12
    ids = np.asarray([pretrained.tokenizer.encode("the river")])
    logits = pretrained.model.apply({"params": pretrained.params}, ids, prefix_len=1)
    assert logits.shape == (1, ids.shape[1] - 1, pretrained.config.vocab_size)


def test_a_stopped_and_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    text, straight, tmp_path
):
    half = small_run(text, steps=6)
    assert train(half, tmp_path) == train_loop.DONE
    assert train(small_run(text), tmp_path) == train_loop.DONE
    assert losses(tmp_path) == losses(straight)
    resumed, whole = load_pretrained(tmp_path), load_pretrained(straight)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_sigterm_saves_the_current_step_and_leaves_with_143(text, tmp_path):
    command = [
        sys.executable,
        "train.py",
        "--config=configs/tiny.py",
        f"--workdir={tmp_path}",
        f"--config.data.source={text}",
        "--config.steps=100000",
        "--config.log_every=1",
        "--config.eval_every=1000000",
        "--config.checkpoint_every=1000000",
        "--config.model.residual_dropout=0.1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 143
    (step,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert step == max(losses(tmp_path))


def test_a_signal_during_an_evaluation_saves_the_current_step_too(
    text, tmp_path, monkeypatch, capsys
):
    def preempted(*arguments, **options):
        result = evaluate(*arguments, **options)
        if (tmp_path / "metrics.jsonl").stat().st_size > 200:  # not in the one before step 1
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(train_loop, "evaluate", preempted)
    assert train(small_run(text, eval_every=3), tmp_path) == 143
    assert load_pretrained(tmp_path).step == 3
    assert "--model=" not in capsys.readouterr().out  # it goes on with the same command


def test_a_non_finite_loss_stops_the_run_and_is_never_saved(text, tmp_path, capsys):
    config = small_run(text)
    config.optimizer.learning_rate = 1e30
    config.optimizer.warmup_steps = 1
    config.optimizer.clip_norm = 0.0
    assert train(config, tmp_path) == train_loop.NON_FINITE
    assert "at step" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"data": {"source": ""}}, "data.source must be given"),
        ({"model": {"num_heads": 5}}, "not a multiple of num_heads"),
        ({"optimizer": {"learning_rate": -1.0}}, "learning_rate must be positive"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_written(text, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(small_run(text, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_problems_of_a_config_are_named_at_once(text, tmp_path):
    config = small_run(text, steps=0, ema_decay=2.0, model={"num_heads": 5}, init_from="a")
    config.resume_from = "b"
    config.data.source = ""
    with pytest.raises(ValueError) as told:
        train(config, tmp_path / "run")
    for words in ("steps must", "ema_decay must", "num_heads", "exclude", "data.source must"):
        assert words in str(told.value)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.optimizer.learning_rat=1", "nearest is config.optimizer.learning_rate"),
        ("--config.steps=1e3", "1e3"),
        ("--config=configs/nope.py", "cannot read the config file configs/nope.py"),
        ("--confg=3", "Unknown command line flag 'confg'"),
    ],
)
def test_a_mistyped_flag_gets_one_line_and_code_2(tmp_path, flag, words):
    command = [sys.executable, "train.py", "--config=configs/tiny.py", "--workdir=x", flag]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_second_run_in_one_workdir_is_refused(text, tmp_path):
    with claimed(tmp_path), pytest.raises(ValueError, match="another run is writing"):
        train(small_run(text), tmp_path)


def test_another_model_in_the_workdir_is_refused_with_the_fields(text, straight):
    before = (straight / "config.json").read_text()
    with pytest.raises(ValueError, match=r"another model: num_channels: 32 -> 64"):
        train(small_run(text, model={"num_channels": 64}), straight)
    assert (straight / "config.json").read_text() == before


def test_a_start_that_failed_binds_nobody(text, tmp_path):
    with pytest.raises(ValueError, match="no data at"):
        train(small_run(tmp_path / "mistyped.txt"), tmp_path / "run")
    config = small_run(text, steps=1, model={"num_channels": 64})
    assert train(config, tmp_path / "run") == train_loop.DONE


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(text, straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for file in (workdir / "checkpoints/12/params").glob("**/d/*"):  # some hold nothing alive
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with pytest.warns(UserWarning, match="step 12"):
        assert load_pretrained(workdir).step == 6
    assert train(small_run(text), workdir) == train_loop.DONE
    said = capsys.readouterr()
    assert "step 12" in said.err
    assert "resumed from step 6" in said.out
    assert losses(workdir) == losses(straight)


def test_without_an_intact_checkpoint_the_run_stops(text, straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for step in (6, 12):
        shutil.rmtree(workdir / f"checkpoints/{step}/params")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint in .*step 12.*step 6"):
        train(small_run(text), workdir)
