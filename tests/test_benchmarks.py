"""The short benchmarks are what their scripts accept, and a slower figure is told from noise."""

import argparse
import fnmatch
import importlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import compare
import run_all


class ParsedError(Exception):
    """Raised in place of measuring."""


@pytest.mark.parametrize("name", run_all.SHORT_RUNS)
def test_the_arguments_of_a_short_run_are_those_of_its_script(name, tmp_path, monkeypatch):
    if name == "tokenizing":
        pytest.importorskip("transformers", reason="compares with Hugging Face's tokenizer")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the script sets it
    script, *arguments = run_all.command_of(name, tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)  # exits where it does not accept them
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(ParsedError):
        importlib.import_module(script.split("/")[-1].removesuffix(".py")).main()


def test_committed_results_have_every_figure_of_every_short_run():
    for name, run in run_all.SHORT_RUNS.items():
        figures = json.loads((ROOT / compare.RESULTS / f"{name}.json").read_text())["figures"]
        for pattern, kind in run.figures:
            found = fnmatch.filter(figures, pattern)
            assert found, f"{name} has no {pattern}: `make bench` writes it"
            assert {figures[each]["kind"] for each in found} == {kind}


def result(kind="speed ratio", values=(2.0, 2.1, 1.9), jax="0.10.2", **more):
    conditions = {"command": "read", "processor": "a processor", "jax": jax, "load": 1.0}
    return conditions | more | {"figures": {"x": {"kind": kind, "values": list(values)}}}


def verdict(old, new):
    """None for noise, otherwise whether it is slower."""
    found = [is_slower for name, _, is_slower in compare.differences(old, new) if name == "x"]
    return found[0] if found else None


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("speed ratio", (1.9, 2.0, 1.8), None),  # each range is 10 % of its median
        ("speed ratio", (1.55, 1.6, 1.65), True),
        ("speed ratio", (2.5, 2.6, 2.7), False),
        ("cost ratio", (2.5, 2.6, 2.7), True),
        ("memory", (1.5, 1.5, 1.5), False),
        ("seconds", (2.5, 2.6, 2.7), True),
        ("rate", (1.4, 1.5, 1.6), True),
    ],
)
def test_what_changes_by_more_than_the_ranges_of_its_values_is_reported(kind, values, expected):
    assert verdict(result(kind), result(kind, values)) is expected


def test_values_that_agree_exactly_may_still_change_by_a_tenth():
    assert verdict(result(values=[1, 1, 1]), result(values=[0.92] * 3)) is None
    assert verdict(result(values=[1, 1, 1]), result(values=[0.9] * 3)) is True


def test_seconds_of_another_machine_or_jax_are_not_compared_and_ratios_are():
    slow = (9, 9, 9)
    assert verdict(result("seconds", jax="0.12"), result("seconds", slow)) is None
    assert verdict(result("cost ratio", jax="0.12"), result("cost ratio", slow)) is True


def test_only_memory_is_compared_between_a_quiet_machine_and_a_busy_one():
    slow = (9, 9, 9)
    assert verdict(result("cost ratio", load=4.0), result("cost ratio", slow)) is None
    assert verdict(result("memory", load=4.0), result("memory", slow)) is True


def test_seconds_and_rates_are_relative_to_the_matmul_of_their_run():
    half_speed = {"matmul_gflops": [50, 50, 50]}
    before = {"matmul_gflops": [100, 100, 100]}
    for kind, values in (("seconds", (4, 4.2, 3.8)), ("rate", (1, 1.05, 0.95))):
        old, new = result(kind, **before), result(kind, values, **half_speed)
        assert verdict(old, new) is None
        assert verdict(old, result(kind, values, **before)) is True


def test_the_working_tree_is_compared_with_what_is_committed(tmp_path, monkeypatch, capsys):
    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
        return compare.main(), capsys.readouterr()

    monkeypatch.setattr(compare, "ROOT", tmp_path)
    path = tmp_path / compare.RESULTS / "reading.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result()))
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "figures"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    code, output = said()
    assert code == 0 and "reading: the same measurement as in HEAD" in output.out
    path.write_text(json.dumps(result(values=(1.4, 1.5, 1.6))))
    (path.parent / "writing.json").write_text(json.dumps(result()))
    code, output = said()
    assert code == 1 and "reading: x: slower: 2 → 1.5 (-25%, noise 23%)" in output.out
    assert "writing: not in HEAD" in output.out
    path.write_text(json.dumps(result(values=(2.0, 2.1, 2.2))))
    code, output = said("--names", "reading")
    assert code == 0 and "nothing slower, of 1 figures compared" in output.out
    path.write_text(json.dumps(result(values=(1, 1, 1), command="read twice")))
    code, output = said("--names", "reading")
    assert code == 0 and "reading: not compared, as its command was read\n" in output.out
    code, output = said("--ref=v9")
    assert code == 2 and output.err == "compare.py: --ref=v9 is not a commit here\n"
