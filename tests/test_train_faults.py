"""Full disks, failing saves and signals at any moment: saved steps stay intact."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from failing_commits import fail_commits
from small_runs import losses, small_run, train, write_text

from perceiver_ar_jax import load_pretrained, train_loop
from perceiver_ar_jax.training.checkpoint import SaveError


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def steps_kept(workdir: Path) -> list[int]:
    names = (folder.name for folder in (workdir / "checkpoints").glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def start(workdir: Path, text: Path, *flags: str, before: str = "pass") -> subprocess.Popen:
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, '.'); {before}; sys.argv = sys.argv[1:]; "
        "import runpy; runpy.run_path('train.py', run_name='__main__')",
        "train.py",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--config.data.source={text}",
        "--config.log_every=1",
        "--config.sample.max_new_tokens=2",
        *flags,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_stops_the_run_with_one_line_and_the_step_before_intact(text, tmp_path):
    code = train(small_run(text, steps=6), tmp_path)
    assert code == train_loop.DONE
    # Files may not grow beyond this from here on: smaller than the arrays, larger than the logs.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    flags = ("--config.steps=12", "--config.model.residual_dropout=0.1", "--config.batch_size=8")
    flags += ("--config.model.cross_attention_dropout=0.5", "--config.checkpoint_every=2")
    process = start(tmp_path, text, *flags, before=f"{limit}; {ignore}")
    said = process.communicate(timeout=400)[1]
    assert process.returncode == 2, said
    # TensorStore's threads may add lines of their own.
    ours = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert len(ours) == 1
    assert "cannot save a checkpoint in" in ours[0]
    assert steps_kept(tmp_path) == [6]
    assert load_pretrained(tmp_path).step == 6


def test_a_folder_that_cannot_be_written_any_more_stops_the_run(text, tmp_path, monkeypatch):
    folder, aside = tmp_path / "checkpoints", tmp_path / "aside"
    take_step = train_loop._Loop._take_step

    def interrupted(self):
        take_step(self)
        if self.step == 3:
            self.checkpointer.wait()
            folder.rename(aside)
            folder.write_text("in the way")  # permissions would not stop root

    monkeypatch.setattr(train_loop._Loop, "_take_step", interrupted)
    with pytest.raises(SaveError, match="cannot save a checkpoint in"):
        train(small_run(text, checkpoint_every=2), tmp_path)
    folder.unlink()
    aside.rename(folder)
    assert load_pretrained(tmp_path).step == 2


def test_a_save_that_fails_in_the_background_stops_the_run_which_can_be_resumed(
    text, tmp_path, monkeypatch
):
    failing = fail_commits(monkeypatch)
    failing.add("4")
    config = small_run(text, steps=8, checkpoint_every=2)
    with pytest.raises(SaveError, match="the disk is gone"):
        train(config, tmp_path)
    assert steps_kept(tmp_path) == [2]
    assert train(config, tmp_path) == train_loop.DONE
    assert steps_kept(tmp_path) == [6, 8]


@pytest.mark.parametrize("moment", ["_take_step", "_evaluate", "_save"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_at_any_moment_saves_the_current_step(
    text, tmp_path, monkeypatch, moment, number, code
):
    real = getattr(train_loop._Loop, moment)

    def interrupted(self, *arguments, **options):
        if self.step or moment == "_take_step":
            signal.raise_signal(number)
        return real(self, *arguments, **options)

    monkeypatch.setattr(train_loop._Loop, moment, interrupted)
    handler = signal.getsignal(signal.SIGINT)
    config = small_run(text, eval_every=3, checkpoint_every=3)
    assert train(config, tmp_path) == code
    assert steps_kept(tmp_path)[-1] == max(losses(tmp_path))
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_while_the_step_is_compiled_leaves_before_the_first_step(
    text, tmp_path, monkeypatch
):
    def interrupted(self):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_loop._Loop, "_compile", interrupted)
    assert train(small_run(text), tmp_path) == 143
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_second_signal_leaves_at_once(text, tmp_path):
    process = start(tmp_path, text, "--config.steps=100000", "--config.checkpoint_every=100000")
    deadline = time.monotonic() + 400
    while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # so that both are there before it can do anything
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=400)
    assert process.returncode in (143, -signal.SIGTERM)
