"""Every second of a run belongs to its start, to steps, to an evaluation or to a save."""

import json

import numpy as np
import pytest
from small_runs import metrics, small_run, train, write_text

from perceiver_ar_jax import train_loop
from perceiver_ar_jax.training import OptimizerConfig, learning_rate_at, learning_rate_schedule
from perceiver_ar_jax.training.goodput import Goodput
from perceiver_ar_jax.training.metrics import Progress
from perceiver_ar_jax.training.report import Report
from perceiver_ar_jax.training.timeline import Timeline


class Clock:
    """Stands still unless somebody works."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def report_of(workdir, clock, **options) -> Report:
    timeline = Timeline(clock)
    goodput = Goodput(workdir / "goodput.json", timeline, step=0, productive=0.0)
    defaults = {
        "step": 0,
        "total_steps": 10,
        "log_every": 4,
        "optimizer": OptimizerConfig(),
        "flops_per_step": 6e12,
        "peak_flops": 12e12,
    }
    return Report(workdir, timeline, goodput=goodput, **defaults | options)


def step_metrics(loss=1.0):
    return {"loss": np.float32(loss), "grad_norm": np.float32(1), "tokens": np.float32(100)}


def test_windows_evaluations_saves_and_the_start_add_up_to_all_time(tmp_path, clock):
    report = report_of(tmp_path, clock)
    clock.work(30)  # opens data, compiles
    report.started()
    for step in range(1, 11):
        report.timed_wait(lambda: clock.work(0.25))
        clock.work(1.75)
        report.read(step, step_metrics(), read_tokens=200, data_retries=step)
        if step == 6:  # in the middle of a window
            clock.work(20)
            report.evaluation(step, 1.0, 1.0)
            clock.work(5)
            report.sample(step, "text")
            clock.work(7)
            report.saved()
    clock.work(2)  # waits for the last save
    report.close()
    windows = [line for line in metrics(tmp_path) if "train/loss" in line]
    assert [line["step"] for line in windows] == [4, 8, 10]
    for line in windows:
        assert line["perf/step_ms"] == 2000
        assert line["perf/tokens_per_sec"] == 100
        assert line["perf/trained_tokens_per_sec"] == 50
        assert line["perf/mfu"] == 0.25
        assert line["data/wait_share"] == 0.125
        assert line["data/retries"] == line["step"]
    (evaluation,) = (line for line in metrics(tmp_path) if "eval/loss" in line)
    assert evaluation["perf/eval_seconds"] == 20
    kept = json.loads((tmp_path / "goodput.json").read_text())
    assert kept["seconds_of_this_start"] == {
        "start": 30,
        "steps": 20,
        "evaluation": 25,
        "save": 9,
    }
    assert kept["alive_seconds"] == clock.now - 1000
    assert windows[0]["perf/goodput"] == 8 / 38


def test_a_run_leaves_no_time_out(tmp_path, clock, monkeypatch):
    """The real loop, whose every part takes a time of its own by a clock that it moves on."""

    def costly(owner, name, seconds):
        real = getattr(owner, name)

        def function(*arguments, **options):
            clock.work(seconds)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, function)

    compile_step = train_loop._Loop._compile

    def compile_costly_step(loop):
        clock.work(300)
        compiled = compile_step(loop)
        return lambda state, batch: (clock.work(5), compiled(state, batch))[1]

    monkeypatch.setattr(train_loop._Loop, "_compile", compile_costly_step)
    costly(train_loop, "evaluate", 50)
    costly(train_loop.Checkpointer, "save", 7)
    monkeypatch.setattr(train_loop, "Timeline", lambda: Timeline(clock))
    text = write_text(tmp_path)
    config = small_run(text, steps=6, log_every=4, eval_every=3, checkpoint_every=4)
    assert train(config, tmp_path / "run") == train_loop.DONE
    lines = metrics(tmp_path / "run")
    windows = [line for line in lines if "train/loss" in line]
    steps = sum(x["perf/step_ms"] / 1000 * n for x, n in zip(windows, (4, 2), strict=True))
    kept = json.loads((tmp_path / "run" / "goodput.json").read_text())
    spent = kept["seconds_of_this_start"]
    assert spent == {"start": 300, "steps": 30, "evaluation": 150, "save": 14}
    assert steps == pytest.approx(spent["steps"])
    assert sum(spent.values()) == clock.now - 1000


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(learning_rate=0.5, warmup_steps=10, total_steps=50, min_fraction=0.1),
        OptimizerConfig(learning_rate=0.5, warmup_steps=0, total_steps=50, min_fraction=0.0),
        OptimizerConfig(learning_rate=0.5, warmup_steps=20, total_steps=20),
    ],
    ids=str,
)
def test_the_learning_rate_on_the_host_is_that_of_the_schedule(config):
    schedule = learning_rate_schedule(config)
    for step in (0, 1, 9, 10, 11, 19, 20, 21, 30, 49, 50, 70):
        assert learning_rate_at(config, step) == pytest.approx(float(schedule(step)), abs=1e-7)


def test_a_log_line_computes_nothing_on_a_device(tmp_path, clock, monkeypatch):
    report = report_of(tmp_path, clock, log_every=1)

    def refuse(*arguments, **options):
        raise AssertionError("a log line waits for the device")

    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", refuse)
    monkeypatch.setattr("jax.device_put", refuse)
    clock.work(1)
    report.read(1, step_metrics(), read_tokens=1, data_retries=0)
    report.close()
    assert metrics(tmp_path)[0]["optim/learning_rate"] == 0.0


def test_the_eta_is_by_recent_steps_alone_and_old_evaluations_are_not_repeated(capsys):
    progress = Progress(0, 100)
    progress.update(0, "eval 5.0 nats")
    for step in range(10, 121, 10):
        progress.took(10, 10.0 if step <= 20 else 20.0)
    progress.update(40, "loss 3.0")
    progress.close()
    assert (
        capsys.readouterr().out == "step 0/100  eval 5.0 nats\nstep 40/100  loss 3.0  ETA 0:02:00\n"
    )
