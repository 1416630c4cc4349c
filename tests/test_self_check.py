"""Whether a device computes what it should: at a run's start, and by check_accelerator.py."""

import json
import sys

import jax
import pytest
from conftest import ROOT
from small_models import small_config

from perceiver_ar_jax import self_check
from perceiver_ar_jax.model.attention import dispatch, recompute

sys.path.append(str(ROOT / "tools"))

import check_accelerator

CONFIG = small_config(remat="names")


@pytest.fixture
def wrong_attention(monkeypatch):
    """`recompute` as a compiler might break it."""

    def attend(*arguments, **options):
        out, lse = recompute.attend(*arguments, **options)
        return 1.5 * out, lse

    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "recompute", attend)


def test_a_device_that_computes_rightly_passes():
    assert self_check.check_device(CONFIG) < 1e-5
    assert 1e-4 < self_check.check_device(CONFIG.replace(dtype="bfloat16")) < 0.05


def test_a_device_that_computes_wrongly_is_refused_with_the_version_of_jax(wrong_attention):
    with pytest.raises(ValueError, match="computes a small training step wrongly") as error:
        self_check.check_device(CONFIG)
    assert str(error.value).startswith(f"jax {jax.__version__} on cpu")
    assert "model.attention=plain" in str(error.value)


def check(monkeypatch, tmp_path, *flags):
    output = tmp_path / "cpu.json"
    command = ["check_accelerator.py", "--small", f"--output={output}", *flags]
    monkeypatch.setattr(sys, "argv", command)
    code = check_accelerator.main()
    return code, json.loads(output.read_text())


def test_the_figures_of_a_device_are_written(monkeypatch, tmp_path):
    flags = ["--implementations", "recompute", "--batch", "2", "--steps", "1"]
    code, results = check(monkeypatch, tmp_path, *flags)
    assert (code, results["wrong"]) == (0, [])
    assert results["about"]["platform"] == "cpu"
    assert len(results["numerics"]) == 5
    assert all(row["out"] < 0.01 for row in results["numerics"][:4])
    (step,) = results["training"]
    assert step["tokens_per_second"] * step["seconds_per_step"] == pytest.approx(2 * 32)
    assert [row["batch_size"] for row in results["decoding"]] == [1, 8]


def test_wrong_numbers_and_failures_are_named(monkeypatch, tmp_path, wrong_attention):
    def fail(**_):
        raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nof 2")

    for name in ("timed_steps", "timed_decoding"):
        monkeypatch.setattr(check_accelerator, name, fail)
    flags = ["--implementations", "recompute", "--batch", "2"]
    code, results = check(monkeypatch, tmp_path, *flags)
    assert code == 1
    assert any(line.startswith("recompute float32 prefix: out is") for line in results["wrong"])
    assert "training: RuntimeError: RESOURCE_EXHAUSTED: 3 GiB" in results["wrong"]
    assert results["training"][0]["batch_size"] == 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--batch", "0"], "--batch and --steps are at least 1"),
        (["--output=/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--implementations", "magic"], "invalid choice: 'magic'"),
    ],
    ids=str,
)
def test_bad_usage_is_exit_code_2(flags, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_accelerator.py", *flags])
    with pytest.raises(SystemExit) as exit:
        check_accelerator.main()
    assert exit.value.code == 2
    assert complaint in capsys.readouterr().err
