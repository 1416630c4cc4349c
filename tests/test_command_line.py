"""What a user types, and what it prints."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.commands import sample
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.pretrained import save_pretrained
from perceiver_ar_jax.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory):
    """The user's cache folder while these tests run; compiled programs are kept there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = PerceiverARConfig(
        max_seq_len=64,
        max_latents=16,
        num_channels=16,
        num_heads=2,
        num_self_attention_layers=1,
    )
    params = init_params(PerceiverAR(config), jax.random.key(0))
    save_pretrained(folder / "ours", config, params, tokenizer=ByteTokenizer())
    return folder / "ours"


def run(script: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, input=stdin, capture_output=True, text=True
    )


def test_sample_streams_one_prompt_and_gives_its_speeds_on_stderr(model_folder):
    flags = ("--model", model_folder, "--max_new_tokens", 6, "--greedy")
    result = run("sample.py", *flags, stdin="a river\n")
    assert result.returncode == 0
    assert result.stdout.startswith("a river")
    assert "first token after" in result.stderr
    assert "tokens/s" in result.stderr
    assert result.stdout == run("sample.py", *flags, "--prompt", "a river").stdout


def test_sample_reads_a_file_of_prompts_and_prints_json_with_log_probs(model_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a river\nhouse\n")
    flags = ("--prompt_file", tmp_path / "prompts.txt", "--json", "--max_new_tokens", 4)
    result = run("sample.py", "--model", model_folder, *flags)
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["prompt"], second["prompt"]) == ("a river", "house")
    assert len(first["tokens"]) == len(first["log_probs"])
    assert all(log_prob < 0 for log_prob in first["log_probs"])


def test_evaluate_prints_bits_per_byte_as_json(model_folder, tmp_path):
    (tmp_path / "text.txt").write_text("The river runs. " * 20)
    result = run("evaluate.py", "--model", model_folder, "--text", tmp_path / "text.txt")
    line = json.loads(result.stdout)
    assert line["bytes"] == 320
    assert 7 < line["bits_per_byte"] < 9  # 262 equally likely ids are 8.03 bits


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", ""), "the prompt '' is empty"),
        (("--prompt", "x", "--num_latents", "17"), "num_latents=17 out of valid range [1..16]"),
        (("--prompt", "x" * 65), "out of valid range [1..64]: the prompt has 65 tokens"),
        (("--prompt", "x", "--policy", "jump"), "jump"),
        (("--prompt_file", "no/such/file"), "no/such/file"),
        (
            ("--prompt", "x", "--greedy", "--top_k", "5"),
            "top_k=5 changes nothing without",
        ),
    ],
)
def test_sample_says_in_one_line_what_is_wrong(model_folder, arguments, words):
    result = run("sample.py", "--model", model_folder, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_sample_into_a_closed_pipe_ends_silently(model_folder):
    command = [sys.executable, "sample.py", "--model", model_folder, "--prompt", "a", "--greedy"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # as `| head` does once it has seen enough
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=300), said) == (141, b"")


def test_the_help_of_sample_shows_defaults_and_an_example():
    done = run("sample.py", "--help")
    assert done.returncode == 0
    assert "Example:\n  python sample.py --model=DIR" in done.stdout
    words = " ".join(done.stdout.split())
    assert "(default: slide)" in words and "1, perceiver-io's default, costs" in words


def test_a_prompt_file_splits_at_newlines_only_and_skips_blank_lines(tmp_path):
    prompts = ["one\u2028two\x0cthree\x85four", " indented", "last\rone"]
    lines = "\n".join([prompts[0], "", "  ", prompts[1] + "\r", prompts[2]])
    (tmp_path / "prompts.txt").write_bytes(f"\ufeff{lines}\n".encode())
    arguments = argparse.Namespace(prompt=None, prompt_file=tmp_path / "prompts.txt")
    assert sample._prompts(arguments) == prompts
    (tmp_path / "prompts.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="has no prompts: all its lines are blank"):
        sample._prompts(arguments)


def test_the_speed_of_sample_does_not_count_compilation(monkeypatch, capsys):
    monkeypatch.setattr(sample.time, "monotonic", iter([100.0, 130.0, 132.0]).__next__)
    clock = sample._Clock()
    compiled = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.record_event_duration_secs(compiled, 27.5)
    clock.first_token()
    jax.monitoring.record_event_duration_secs(compiled, 1.0)
    clock.report(num_later_tokens=50)
    expected = "first token after 30.00 s (27.50 s compilation), then 50.0 tokens/s\n"
    assert capsys.readouterr().err == expected


def test_a_second_start_of_sample_compiles_nothing(model_folder, cache_folder):
    flags = ["--model", model_folder, "--prompt", "a stone", "--max_new_tokens", "3"]
    kept = lambda: set(cache_folder.rglob("*-cache"))
    assert run("sample.py", *flags).returncode == 0
    programs = kept()
    assert programs
    assert run("sample.py", *flags).returncode == 0
    assert kept() == programs


def test_weights_are_converted_for_decoding(model_folder):
    flags = ["--model", model_folder, "--prompt", "a stone", "--greedy", "--max_new_tokens", "3"]
    assert run("sample.py", *flags, "--weights", "int8", "--cache_dtype", "int8").returncode == 0
    refused = run("sample.py", *flags, "--weights", "int4")
    assert refused.returncode == 2
    assert "weights must be one of float32, bfloat16, int8, not 'int4'" in refused.stderr


def test_a_prompt_file_that_is_not_text_is_named(model_folder, tmp_path):
    (tmp_path / "prompts").write_bytes(b"\xff\xfe")
    result = run("sample.py", "--model", model_folder, "--prompt_file", tmp_path / "prompts")
    assert result.returncode == 2
    assert f"{tmp_path / 'prompts'} is not UTF-8 text" in result.stderr


def test_a_model_that_is_not_there_is_named(tmp_path):
    for command in (("sample.py", "--prompt", "x"), ("evaluate.py", "--text", "x")):
        result = run(*command, "--model", tmp_path / "nothing")
        assert result.returncode == 2
        assert str(tmp_path / "nothing") in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
