import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import import_reference
from reference_tensors import (
    CONFIGS,
    SMALL,
    assert_same_bits,
    random_tensors,
    write_config,
    write_hub_folder,
)
from torch_zip import text, write_archive

from perceiver_ar_jax import convert, load_pretrained
from perceiver_ar_jax.commands import convert as convert_command
from perceiver_ar_jax.conversion import read_reference

ROOT = Path(__file__).resolve().parent.parent
MODEL = SMALL.replace(num_self_attention_layers=1)


@pytest.fixture
def hub_folder(tmp_path):
    write_hub_folder(tmp_path / "hub", MODEL, random_tensors(MODEL))
    return tmp_path / "hub"


def run(*arguments) -> int:
    return convert_command.main([str(argument) for argument in arguments])


def test_a_converted_folder_loads_and_has_a_certificate(hub_folder, tmp_path):
    assert run(hub_folder, "--output", tmp_path / "ours", "--verify", "none") == 0
    ours, theirs = load_pretrained(tmp_path / "ours"), load_pretrained(hub_folder)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    certificate = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    tensors = random_tensors(MODEL)
    assert certificate["model"]["parameters"] == sum(x.size for x in tensors.values()) - 2
    assert set(certificate["model"]["tensors"]) == set(tensors)
    frequencies = certificate["model"]["inverse_frequencies"]
    assert frequencies["max_abs_stored_minus_bf16_formula"] == 0
    assert frequencies["max_abs_stored_minus_formula"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "ours"]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["absolute positions", "rotary only"])
def test_there_and_back_every_bit_is_the_same(name, dtype, tmp_path):
    tensors = random_tensors(CONFIGS[name], dtype)
    write_hub_folder(tmp_path / "hub", CONFIGS[name], tensors)
    assert run(tmp_path / "hub", "--output", tmp_path / "ours", "--verify", "none") == 0
    back = tmp_path / "back"
    assert run(tmp_path / "ours", "--to_torch", "--output", back, "--verify", "none") == 0
    assert_same_bits(read_reference(back).tensors, tensors)


def test_dtype_rounds_the_weights_but_not_the_frequencies(hub_folder, tmp_path):
    out = tmp_path / "ours"
    assert run(hub_folder, "--output", out, "--verify", "none", "--dtype", "bfloat16") == 0
    loaded, stored = load_pretrained(out), read_reference(hub_folder)
    assert {str(x.dtype) for x in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert loaded.config.rotary_inv_freq == stored.config.rotary_inv_freq
    expected = np.asarray(stored.tensors["output_adapter.bias"])
    rounded = np.asarray(loaded.params["output_bias"])
    np.testing.assert_array_equal(rounded, expected.astype(ml_dtypes.bfloat16))


def test_a_dry_run_needs_no_output_reports_and_writes_nothing(hub_folder, tmp_path, capsys):
    assert run(hub_folder, "--dry_run") == 0
    assert run(hub_folder, "--output", tmp_path / "ours", "--dry_run") == 0
    assert os.listdir(tmp_path) == ["hub"]
    assert capsys.readouterr().out.count("27 tensors") == 2
    assert run(hub_folder, "--output", tmp_path / "ours", "--verify", "none") == 0
    capsys.readouterr()
    assert run(tmp_path / "ours", "--to_torch", "--dry_run") == 0
    assert "27 tensors" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["hub", "ours"]


def test_help_shows_defaults_and_an_example_and_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from perceiver_ar_jax.commands import convert\n"
        "sys.argv = ['convert_from_torch.py']\n"
        "try: convert.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'jax', 'numpy', 'flax'}))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert shown.endswith("[]\n")
    assert "python convert_from_torch.py krasserm/perceiver-ar-clm-base --output" in shown
    options = [option for option in shown.split("\n  --")[1:] if "--" not in option.split()[0]]
    assert len(options) == 7 and all("(default: " in option for option in options)


def test_the_tokenizer_beside_the_weights_comes_along_both_ways(hub_folder, tmp_path):
    tokenizer = {
        "tokenizer_class": "PerceiverTokenizer",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    big = MODEL.replace(vocab_size=262)
    write_hub_folder(hub_folder, big, random_tensors(big))
    (hub_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert run(hub_folder, "--output", ours, "--verify", "none") == 0
    assert load_pretrained(ours).tokenizer.encode("a") == [ord("a") + 6]
    assert run(ours, "--to_torch", "--output", back, "--verify", "none") == 0
    assert json.loads((back / "tokenizer_config.json").read_text()) == tokenizer


def test_a_named_sentencepiece_model_becomes_the_tokenizer(tmp_path, shared_data):
    big = MODEL.replace(vocab_size=32000)
    write_hub_folder(tmp_path / "hub", big, random_tensors(big))
    spiece = shared_data / "xlnet" / "spiece.model"
    arguments = ("--verify", "none", "--tokenizer", spiece, "--output", tmp_path / "ours")
    assert run(tmp_path / "hub", *arguments) == 0
    assert (tmp_path / "ours" / "tokenizer" / "spiece.model").read_bytes() == spiece.read_bytes()
    assert load_pretrained(tmp_path / "ours").tokenizer.eos_id == 2


def pretend_reference(monkeypatch, change):
    """Our own logits in the place of perceiver-io's, changed."""

    def logits(rules, tensors, config, inputs):
        return change(convert.our_logits(rules.to_flax(tensors, config), config, inputs))

    monkeypatch.setattr(convert, "reference_logits", logits)


def test_equal_logits_are_certified(hub_folder, tmp_path, monkeypatch):
    pretend_reference(monkeypatch, lambda logits: logits)
    assert run(hub_folder, "--output", tmp_path / "ours", "--verify", "3") == 0
    checks = json.loads((tmp_path / "ours" / "conversion.json").read_text())["checks"]
    assert checks["logits"]["max_abs_difference"] == 0
    assert "bit for bit" in checks["round_trip"]


@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_different_logits_end_with_code_1_and_nothing_written(
    direction, hub_folder, tmp_path, monkeypatch, capsys
):
    source, options = hub_folder, []
    if direction == "to torch":
        assert run(hub_folder, "--output", tmp_path / "ours", "--verify", "none") == 0
        source, options = tmp_path / "ours", ["--to_torch"]
    pretend_reference(monkeypatch, lambda logits: logits[..., ::-1])
    assert run(source, *options, "--output", tmp_path / "result") == 1
    assert not (tmp_path / "result").exists()
    assert "logits differ" in capsys.readouterr().err


def test_without_the_reference_the_round_trip_is_verified(hub_folder, tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("torch and perceiver-io do not import: no torch")

    monkeypatch.setattr(convert, "reference_logits", missing)
    assert run(hub_folder, "--output", tmp_path / "ours") == 0
    checks = json.loads((tmp_path / "ours" / "conversion.json").read_text())["checks"]
    assert checks == {
        "logits": "not compared: torch and perceiver-io do not import: no torch",
        "round_trip": "27 tensors come back bit for bit",
    }


def test_a_tensor_that_does_not_come_back_ends_with_code_1(
    hub_folder, tmp_path, monkeypatch, capsys
):
    save = convert.save_pretrained

    def save_something_else(folder, config, params, **more):
        params["output_bias"] = params["output_bias"] + 1
        save(folder, config, params, **more)

    monkeypatch.setattr(convert, "save_pretrained", save_something_else)
    pretend_reference(monkeypatch, lambda logits: logits)
    assert run(hub_folder, "--output", tmp_path / "ours") == 1
    assert "after a round trip: output_adapter.bias" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["hub"]


def test_a_damaged_checkpoint_of_ours_ends_with_code_4(hub_folder, tmp_path, capsys):
    assert run(hub_folder, "--output", tmp_path / "ours", "--verify", "none") == 0
    for path in (tmp_path / "ours" / "checkpoints" / "0" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert run(tmp_path / "ours", "--to_torch", "--output", tmp_path / "back") == 4
    assert "no intact checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_an_existing_output_is_replaced_only_with_overwrite(hub_folder, tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("x")
    arguments = (hub_folder, "--output", tmp_path / "ours", "--verify", "none")
    assert run(*arguments) == 2
    assert "is not empty; overwrite replaces it" in capsys.readouterr().err
    assert os.listdir(tmp_path / "ours") == ["precious"]
    assert run(*arguments, "--overwrite") == 0
    assert not (tmp_path / "ours" / "precious").exists()


def test_ctrl_c_removes_the_unfinished_folder_and_is_silent(hub_folder, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from perceiver_ar_jax import command_line, convert\n"
        "from perceiver_ar_jax.commands import convert as command\n"
        "convert.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
        "command_line.start_quietly()\n"
        "command_line.run_script('x', lambda: command.main(sys.argv[1:]))\n"
    )
    arguments = [str(hub_folder), "--output", str(tmp_path / "ours"), "--verify", "none"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert os.listdir(tmp_path) == ["hub"]


def bad_source(folder, name):
    """Arguments that cannot be converted, and part of what is said about them."""
    match name:
        case "missing":
            return [folder / "nowhere"], "nothing at"
        case "harmful":
            write_archive(folder / "x.ckpt", b"cposix\nsystem\n(" + text("exit 1") + b"tR")
            return [folder / "x.ckpt"], "refused: its pickle names posix.system"
        case "cut off":
            path = folder / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-7])
            return [folder], "it is cut off"
        case "wrong config":
            write_config(folder, MODEL, num_heads=3)
            return [folder], "not a multiple of num_heads 3"
        case "not ours":
            return [folder, "--to_torch"], "is not a checkpoint of ours"
        case "tokenizer":
            (folder / "page.model").write_text("<!doctype html>")
            return [folder, "--tokenizer", folder / "page.model"], "is an HTML page"
        case "rows":
            return [folder, "--verify", "all"], "neither a number of rows nor none"
        case "option":
            return [folder, "--out_put", "x"], "--out_put"
        case "no output":
            return [folder], "--output is missing; only --dry_run does without"


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "harmful",
        "cut off",
        "wrong config",
        "not ours",
        "tokenizer",
        "rows",
        "option",
        "no output",
    ],
)
def test_bad_input_gets_one_line_and_code_2(name, hub_folder, tmp_path, capsys):
    arguments, message = bad_source(hub_folder, name)
    try:
        output = [] if name == "no output" else ["--output", tmp_path / "result"]
        code = run(*arguments, *output)
    except SystemExit as end:  # argparse leaves by itself
        code = end.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "result").exists()


def test_the_command_compares_logits_with_perceiver_io_by_default(hub_folder, tmp_path):
    import_reference("torch")
    write_config(hub_folder, MODEL, activation_offloading=True)
    done = subprocess.run(
        [sys.executable, ROOT / "convert_from_torch.py", hub_folder, "--output", tmp_path / "ours"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: activation_offloading has no counterpart" in done.stderr
    logits = json.loads((tmp_path / "ours" / "conversion.json").read_text())["checks"]["logits"]
    assert logits["max_abs_difference"] < 1e-4 < logits["max_abs_logit"]
    assert logits["max_kl"] < 1e-8
