"""Runs followed by stand-ins of wandb and trackio; the real ones are not installed."""

import importlib.machinery
import json
import sys
import types

import pytest
from etils import epath
from small_runs import metrics, small_run, train, write_text

from perceiver_ar_jax.run_config import RunConfig
from perceiver_ar_jax.training.trackers import TRACKERS, Tracker


class StandIn(types.ModuleType):
    """A tracker that keeps its runs by their identity, and fails where it is told to."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.runs, self.starts, self.refuses, self.fails_at = {}, [], False, None

    def init(self, **options):
        if self.refuses:
            raise RuntimeError("no key\nsee the page on keys")
        assert options["resume"] == "allow"
        self.starts.append(options)
        lines = self.runs.setdefault(options.get("id", options["name"]), [])
        return types.SimpleNamespace(log=lambda x, step: self._log(lines, x, step), finish=list)

    def _log(self, lines, values, step):
        if step == self.fails_at:
            raise OSError("the network is gone")
        lines.append({"step": step, **values})


@pytest.fixture
def trackers(monkeypatch):
    modules = {name: StandIn(name) for name in TRACKERS}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data"))


def test_trackers_get_the_metrics_of_a_run_and_of_its_resumption_as_one_run(
    text, tmp_path, trackers
):
    workdir = tmp_path / "run"
    both = {"trackers": "wandb, trackio", "eval_every": 4, "checkpoint_every": 4, "project": "p"}
    assert train(small_run(text, steps=4, **both), workdir) == 0
    assert train(small_run(text, steps=8, **both), workdir) == 0
    for name, module in trackers.items():
        (lines,) = module.runs.values()
        assert lines == metrics(workdir), name
        assert [start["project"] for start in module.starts] == ["p", "p"]
        assert module.starts[1]["config"]["steps"] == 8
        json.dumps(module.starts[1]["config"])
    assert {start["name"] for start in trackers["wandb"].starts} == {"run"}


def test_a_tracker_that_fails_is_left_out_and_says_so_once(tmp_path, trackers, capsys):
    trackers["wandb"].fails_at = 2
    tracker = Tracker("wandb", epath.Path(tmp_path), project="p", settings={})
    for step in (1, 2, 3):
        tracker.write(step, {"train/loss": 1.0})
    tracker.close()
    (lines,) = trackers["wandb"].runs.values()
    assert lines == [{"step": 1, "train/loss": 1.0}]
    assert capsys.readouterr().err == "wandb failed and is left out: the network is gone\n"


def test_a_tracker_that_is_missing_or_does_not_start_ends_the_run_before_it_begins(
    text, tmp_path, trackers, monkeypatch
):
    config = small_run(text, trackers="trackio")
    trackers["trackio"].refuses = True
    with pytest.raises(ValueError, match=r"^trackio does not start: no key$"):
        train(config, tmp_path / "refused")
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()
    monkeypatch.delitem(sys.modules, "trackio")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^trackers=trackio needs trackio: pip install trackio$"):
        train(config, tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(ValueError, match="trackers has 'tensorboard'; there are wandb and trackio"):
        RunConfig.from_config(small_run(text, trackers="wandb,tensorboard"))
