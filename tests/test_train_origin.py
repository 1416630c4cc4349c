"""Where a run's first weights come from, what is compared before, and when anything is written."""

import json
import shlex
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_params
from small_runs import small_run, train, write_text

from perceiver_ar_jax import PerceiverARConfig, load_pretrained, train_loop
from perceiver_ar_jax.commands import evaluate, sample
from perceiver_ar_jax.pretrained import save_pretrained
from perceiver_ar_jax.run_config import RunConfig
from perceiver_ar_jax.run_header import memory_lines
from perceiver_ar_jax.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece

FREQUENCIES = (0.75, 0.25, 0.125, 0.0625)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def quick_run(text, **changes):
    config = small_run(text, steps=1)
    config.optimizer.update({"total_steps": 1, "warmup_steps": 1, "learning_rate": 1e-12})
    config.model.num_self_attention_layers = 1
    config.sample.max_new_tokens = 2
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def given(text, tmp_path_factory) -> Path:
    """Weights in bfloat16 with rotary frequencies of their own, and the byte tokenizer."""
    folder = tmp_path_factory.mktemp("given")
    model = RunConfig.from_config(quick_run(text)).model
    model = model.replace(rotary_inv_freq=FREQUENCIES, param_dtype="bfloat16")
    save_pretrained(folder / "given", model, random_params(model), tokenizer=ByteTokenizer())
    return folder / "given"


@pytest.fixture(scope="module")
def first(text, given, tmp_path_factory) -> Path:
    """The workdir of a run that began with those weights."""
    workdir = tmp_path_factory.mktemp("first")
    assert train(quick_run(text, init_from=str(given)), workdir) == train_loop.DONE
    return workdir


def test_weights_in_bfloat16_are_cast_to_the_dtype_of_the_run(text, given, tmp_path, capsys):
    assert train(quick_run(text, init_from=str(given)), tmp_path) == train_loop.DONE
    said = capsys.readouterr().out
    assert f"weights of {given} are cast from bfloat16 to float32" in said
    assert "sample at step 0:\nThe" in said  # of weights that are trained
    trained, before = load_pretrained(tmp_path), load_pretrained(given)
    assert {x.dtype for x in jax.tree.leaves(trained.params)} == {jnp.dtype("float32")}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y, np.float32)),
        trained.params,
        before.params,
    )


def test_frequencies_travel_to_a_run_that_resumes_from_another(text, first, tmp_path):
    config = quick_run(text, resume_from=str(first), steps=2)
    assert train(config, tmp_path) == train_loop.DONE
    assert load_pretrained(tmp_path).config.rotary_inv_freq == FREQUENCIES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 4}, "num_heads: 2 -> 4"),
        ({"num_self_attention_rotary_layers": 0}, "rotary_layers: 1 -> 0"),
        ({"max_latents": 16}, "max_latents: 32 -> 16"),
        ({"residual_dropout": 0.3}, "residual_dropout: 0.1 -> 0.3"),
    ],
    ids=str,
)
def test_resuming_from_a_run_of_another_model_is_refused(text, first, tmp_path, change, words):
    config = quick_run(text, resume_from=str(first), steps=2, model=change)
    with pytest.raises(ValueError, match=words):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_mistyped_resume_from_is_named_and_left_alone(text, tmp_path):
    with pytest.raises(ValueError, match="typo is not the workdir of a run"):
        train(quick_run(text, resume_from=str(tmp_path / "typo")), tmp_path / "run")
    assert not (tmp_path / "typo").exists()


def test_weights_of_another_tokenizer_are_refused_unless_they_may(text, tmp_path):
    texts = [f"The house number {i} sees another river, (as ever)." for i in range(100)]
    train_sentencepiece(texts, tmp_path / "mine.model", 290)
    config = quick_run(text, init_from=str(tmp_path / "given"), model={"vocab_size": 300})
    model = RunConfig.from_config(config).model
    tokenizer = load_tokenizer(tmp_path / "mine.model")
    save_pretrained(tmp_path / "given", model, random_params(model), tokenizer=tokenizer)
    assert load_pretrained(tmp_path / "given").tokenizer.sha256 == tokenizer.sha256
    with pytest.raises(ValueError, match=r"the tokenizer of .*given \(sha256 \w{12}…\) is not"):
        train(config, tmp_path / "run")
    config.data.allow_change = True
    assert train(config, tmp_path / "run") == train_loop.DONE


def test_a_refused_start_leaves_the_description_of_the_run_as_it_was(text, first):
    before = {name: (first / name).read_bytes() for name in ("config.json", "env.json")}
    with pytest.raises(ValueError, match="data differs"):
        train(quick_run(text, steps=3, seed=1), first)
    assert {name: (first / name).read_bytes() for name in before} == before


def test_a_finished_run_says_so_at_once_and_compiles_nothing(text, first, capsys, monkeypatch):
    monkeypatch.delattr(train_loop, "lower_train_step")
    assert train(quick_run(text), first) == train_loop.DONE
    assert "already at step 1 of 1; raise config.steps to go on" in capsys.readouterr().out


def test_a_model_without_prefix_trains_and_samples(text, tmp_path, capsys, monkeypatch):
    config = quick_run(text, model={"max_latents": 64, "max_seq_len": 64})
    config.sample.prompt = "The river runs"
    monkeypatch.setattr(sys, "argv", ["perceiver-ar train"])
    assert train(config, tmp_path) == train_loop.DONE
    said = capsys.readouterr().out
    assert "sample at step 1:\nThe river runs" in said
    assert "sample at step 0" not in said  # of weights that nothing has trained
    commands = [line.split(maxsplit=3)[1:] for line in said.splitlines()[-2:]]
    assert [command[:2] for command in commands] == [
        ["perceiver-ar", "sample"],
        ["perceiver-ar", "evaluate"],
    ]
    to_sample, to_evaluate = (
        command._parser().parse_args(shlex.split(arguments))
        for command, (*_, arguments) in zip((sample, evaluate), commands, strict=True)
    )
    assert to_sample.model == to_evaluate.model == str(tmp_path)
    assert to_sample.prompt == ["The river runs"]
    assert (to_evaluate.text, to_evaluate.split) == (str(text), "validation")


def test_a_prompt_that_the_model_cannot_read_is_refused_at_the_start(text, tmp_path):
    config = quick_run(text)
    config.sample.prompt = "x" * 65
    with pytest.raises(ValueError, match=r"sample.prompt has 65 tokens; the model reads 1 to 64"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "sample.prompt must not be empty"),
        ({"max_new_tokens": 0}, "sample.max_new_tokens must be a whole number of at least 1"),
        ({"num_latents": 33}, "sample.num_latents 33 exceeds model.max_latents 32"),
        ({"temperature": 0.0}, "sample.temperature must be above 0, not 0.0"),
        ({"top_k": -1}, "sample.top_k must be a whole number of at least 0, not -1"),
    ],
    ids=str,
)
def test_sample_settings_are_checked_at_the_start_and_named(text, change, words):
    with pytest.raises(ValueError, match=words):
        RunConfig.from_config(quick_run(text, sample=change))


def test_a_dry_run_says_what_would_run_and_writes_nothing(text, tmp_path, capsys):
    run = RunConfig.from_config(quick_run(text))
    assert train_loop.run(run, tmp_path / "run", dry_run=True) == train_loop.DONE
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    count = sum(x.size for x in jax.tree.leaves(random_params(run.model)))
    assert f"{count:,} parameters in float32" in lines[0]
    assert "8 × cpu" in lines[1] and "data=8" in lines[1]
    assert str(text) in lines[2] and "294 records in 1 file" in lines[2]
    assert "at most 512 read and 256 trained on" in lines[3]
    assert str(tmp_path / "run") in lines[5]
    assert json.loads("\n".join(lines[6:])) == json.loads(json.dumps(run.to_dict()))


@pytest.mark.parametrize(("temporaries", "lines"), [(1, 1), (2**60, 2)])
def test_what_does_not_fit_into_memory_is_said_before_the_first_step(temporaries, lines):
    memory = types.SimpleNamespace(argument_size_in_bytes=1, temp_size_in_bytes=temporaries)
    compiled = types.SimpleNamespace(memory_analysis=lambda: memory)
    said = list(memory_lines(compiled, num_local_devices=8))
    assert len(said) == lines
    assert lines == 1 or "will not fit: this host has" in said[1]


def test_the_shortest_window_has_as_many_tokens_as_latents_unless_it_is_set(text):
    config = quick_run(text)
    config.data.min_seq_len = None
    assert RunConfig.from_config(config).train_data.min_seq_len == config.model.max_latents
    config.data.min_seq_len = 48
    assert RunConfig.from_config(config).train_data.min_seq_len == 48


def test_a_warm_up_ends_with_a_shorter_run(text):
    config = small_run(text, steps=2)
    config.optimizer.total_steps, config.optimizer.warmup_steps = 2, 5
    assert RunConfig.from_config(config).optimizer.warmup_steps == 2


def test_settings_that_do_not_exist_are_named(text):
    config = quick_run(text)
    config.optimiser = 3
    config.model.width = 8
    with pytest.raises(ValueError) as told:
        RunConfig.from_config(config)
    assert "RunConfig does not have the setting optimiser" in str(told.value)
    assert f"{PerceiverARConfig.__name__} does not have the setting width" in str(told.value)
