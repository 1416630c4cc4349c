"""What the settings of a run do beyond the plain run of test_train_loop."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from small_runs import losses, metrics, small_run, train, write_text

from perceiver_ar_jax import load_pretrained, train_loop
from perceiver_ar_jax.pretrained import save_pretrained
from perceiver_ar_jax.training import step as step_file
from perceiver_ar_jax.training.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("straight")
    assert train(small_run(text), workdir) == train_loop.DONE
    return workdir


def steps_kept(workdir: Path) -> set[int]:
    return {int(folder.name) for folder in (workdir / "checkpoints").iterdir()}


def assert_same_params(first, second):
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_retention_keeps_the_last_every_so_many_and_the_best(text, tmp_path, monkeypatch):
    evaluated = iter([9.0, 5.0, 3.0, 4.0, 4.5, 6.0, 7.0])  # best at step 4
    real = train_loop.evaluate

    def with_other_loss(*arguments, **options):
        return dataclasses.replace(real(*arguments, **options), loss=next(evaluated))

    monkeypatch.setattr(train_loop, "evaluate", with_other_loss)
    config = small_run(
        text, eval_every=2, checkpoint_every=2, keep_checkpoints=1, keep_every=6, keep_best=True
    )
    assert train(config, tmp_path) == train_loop.DONE
    assert steps_kept(tmp_path) == {4, 6, 12}
    assert load_pretrained(tmp_path, step=4).step == 4


def test_a_run_begins_with_the_weights_it_is_given(text, straight, tmp_path):
    given = load_pretrained(straight)
    config = given.config.replace(rotary_inv_freq=(0.75, 0.25, 0.125, 0.0625))
    save_pretrained(tmp_path / "given", config, given.params)
    run = small_run(text, init_from=str(tmp_path / "given"), steps=1)
    run.optimizer.learning_rate = 1e-12
    run.optimizer.warmup_steps = 1
    assert train(run, tmp_path / "run") == train_loop.DONE
    trained = load_pretrained(tmp_path / "run")
    assert trained.config.rotary_inv_freq == config.rotary_inv_freq
    assert_same_params(trained, given)
    shutil.rmtree(tmp_path / "given")  # what the run took over it keeps
    run.steps, run.init_from = 2, ""
    assert train(run, tmp_path / "run") == train_loop.DONE


def test_weights_of_another_model_are_refused_with_the_fields(text, straight, tmp_path):
    run = small_run(text, init_from=str(straight), model={"num_channels": 64})
    with pytest.raises(ValueError, match=r"is another model: num_channels: 32 -> 64"):
        train(run, tmp_path)


def test_a_run_continues_from_another_one_in_its_own_workdir(text, straight, tmp_path):
    half = small_run(text, steps=6)
    assert train(half, tmp_path / "half") == train_loop.DONE
    whole = small_run(text, resume_from=str(tmp_path / "half"))
    assert train(whole, tmp_path / "whole") == train_loop.DONE
    assert steps_kept(tmp_path / "half") == {6}
    expected = losses(straight)
    assert losses(tmp_path / "whole") == {step: expected[step] for step in range(7, 13)}


def test_a_run_that_averages_its_weights_is_evaluated_on_the_average(text, tmp_path):
    config = small_run(text, ema_decay=0.5, steps=6)
    assert train(config, tmp_path) == train_loop.DONE
    averaged = load_pretrained(tmp_path).params
    shutil.rmtree(tmp_path / "checkpoints/6/ema")
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path)
    assert np.isfinite(averaged["output_bias"]).all()


def test_averaging_may_begin_later(text, straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    config = small_run(text, ema_decay=0.5, steps=13)
    assert train(config, workdir) == train_loop.DONE
    assert steps_kept(workdir) == {12, 13}
    plain = load_pretrained(workdir, step=12).params["output_bias"]
    averaged = load_pretrained(workdir).params["output_bias"]
    assert 0 < np.abs(averaged - plain).max() < 1e-2


def test_skipped_spikes_are_logged_and_survive_a_resume(text, tmp_path):
    def run(workdir, steps):
        config = small_run(text, steps=steps)
        config.optimizer.update({"skip_spikes": True, "spike_window": 3, "spike_threshold": 0.1})
        assert train(config, workdir) == train_loop.DONE
        return [line["optim/skipped_steps"] for line in metrics(workdir) if "train/loss" in line]

    skipped = run(tmp_path / "straight", 12)
    assert 0 < skipped[-1] < 12
    run(tmp_path / "resumed", 6)
    assert run(tmp_path / "resumed", 12) == skipped
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")


def test_data_that_changed_is_refused_with_a_diff_unless_it_may(text, straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    config = small_run(text, steps=13, seed=1)
    with pytest.raises(ValueError, match=r"data differs from the checkpoint's: seed: 0 -> 1"):
        train(config, workdir)
    config.data.allow_change = True
    assert train(config, workdir) == train_loop.DONE
    assert "the data changed, as allowed: seed: 0 -> 1" in capsys.readouterr().out


def test_an_optimizer_of_another_shape_is_refused_and_nothing_put_aside(text, straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    config = small_run(text)
    config.optimizer.skip_spikes = True
    with pytest.raises(
        ValueError,
        match=r"step 12 .* another model or optimizer; \d+ leaves",
    ):
        train(config, workdir)
    assert steps_kept(workdir) == {6, 12}


def test_documents_can_be_kept_apart(text, straight, tmp_path):
    config = small_run(text, steps=6)
    config.data.respect_documents = True
    assert train(config, tmp_path) == train_loop.DONE
    apart, crossing = losses(tmp_path), losses(straight)
    assert apart[1] == crossing[1]  # no window of the first batch reaches a second document
    assert apart[6] != crossing[6]


def test_microbatches_do_not_change_the_loss(text, tmp_path):
    for count in (1, 2):
        config = small_run(text, steps=2, microbatches=count)
        config.batch_size = 16
        config.model.update({"cross_attention_dropout": 0.0, "residual_dropout": 0.0})
        assert train(config, tmp_path / str(count)) == train_loop.DONE
    once, parts = (np.array(list(losses(tmp_path / name).values())) for name in "12")
    np.testing.assert_allclose(once, parts, rtol=1e-5)


def test_steps_and_evaluations_are_compiled_once(text, tmp_path, monkeypatch):
    traced = {"train": 0, "eval": 0}
    head_inputs = step_file._head_inputs

    def counting(params, batch, dropout_key=None, **options):
        traced["eval" if dropout_key is None else "train"] += 1
        return head_inputs(params, batch, dropout_key, **options)

    monkeypatch.setattr(step_file, "_head_inputs", counting)
    config = small_run(text, eval_every=2, steps=6)
    config.model.init_scale = 0.03  # a model that no other test has compiled for evaluation
    assert train(config, tmp_path) == train_loop.DONE
    assert traced == {"train": 1, "eval": 1}


def test_the_profiler_watches_the_steps_it_is_told_to(text, tmp_path):
    # In a process of its own: the profiler crashes where libtpu was loaded to compile for TPUs.
    settings = {"data.source": text, "steps": 4, "profile.first_step": 1, "profile.num_steps": 2}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    assert subprocess.run([*command, *flags], cwd=ROOT, env=environment).returncode == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_memory_of_a_step_is_printed_once(text, tmp_path, capsys):
    assert train(small_run(text, steps=2), tmp_path) == train_loop.DONE
    assert capsys.readouterr().out.count("GiB of state and batch") == 1


def test_goodput_adds_up_over_starts(text, straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "checkpoints/12")  # as if killed before it was saved
    before = json.loads((workdir / "goodput.json").read_text())
    assert train(small_run(text), workdir) == train_loop.DONE
    after = json.loads((workdir / "goodput.json").read_text())
    assert after["lost_steps"] == 6
    assert after["starts"] == 2
    assert after["alive_seconds"] > before["alive_seconds"]
    line = metrics(workdir)[-2]
    assert line["perf/lost_steps"] == 6
    assert 0 < line["perf/goodput"] < 1
