"""Probes against scorers whose memory is known, and against scores by hand."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from small_models import quick_jit, random_params, random_tokens, small_config

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.commands import evaluate
from perceiver_ar_jax.evaluation import probes
from perceiver_ar_jax.evaluation.generation_quality import (
    SEARCHES,
    distinct,
    generation_quality,
    nats_of_new_tokens,
    repeated_share,
)
from perceiver_ar_jax.evaluation.scores import Scores, score_sequences
from perceiver_ar_jax.generation.policies import POLICIES
from perceiver_ar_jax.pretrained import Pretrained, save_pretrained
from perceiver_ar_jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
CONFIG = small_config(vocab_size=262)
LONG = small_config(vocab_size=262, max_seq_len=200, max_latents=60)


def pretrained(config=CONFIG) -> Pretrained:
    return Pretrained(PerceiverAR(config), random_params(config), config, BYTES, 0)


def text_tokens(length: int) -> np.ndarray:
    return np.resize(BYTES.encode("The river runs, and often it sees the yellow house. "), length)


def scorer(memory: int):
    """Scores of a model that knows a token for sure if it came `memory` tokens before."""

    def score(_, sequences, **options):
        del options
        found = []
        for sequence, count in sequences:
            sequence = np.asarray(sequence)
            before = np.concatenate([np.full(memory, -1), sequence])[: len(sequence)]
            ranks = (before != sequence)[-count:].astype(np.int32)
            found.append(Scores(-2.0 * ranks.astype(np.float32), ranks))
        return found

    return score


def test_a_prefix_is_cut_and_the_scored_tokens_stay_the_same():
    stream = text_tokens(60)
    rows = probes.loss_by_prefix(pretrained(), stream, num_windows=4)
    assert [row["prefix"] for row in rows] == [0, 8]
    firsts = np.linspace(0, 60 - 15, 4, dtype=int) + 8
    for row in rows:
        windows = [(stream[first - row["prefix"] : first + 7], 6) for first in firsts]
        nats = [-x.log_probs.mean() for x in score_sequences(pretrained(), windows)]
        np.testing.assert_allclose(row["nats_per_token"], np.mean(nats), rtol=1e-5)
    np.testing.assert_allclose(
        rows[1]["gain"], rows[0]["nats_per_token"] - rows[1]["nats_per_token"], rtol=1e-4
    )
    assert rows[0]["gain"] == rows[0]["standard_error"] == 0
    assert rows[1]["standard_error"] > 0
    with pytest.raises(ValueError, match="the text has 14 tokens, fewer than the 15 of a window"):
        probes.loss_by_prefix(pretrained(), stream[:14])


def test_a_pass_key_is_where_the_table_says(monkeypatch):
    sentence, question = " The pass key is 12345.", " The pass key is 12345"
    longest = 201 - len(sentence) - len(question)
    for distance in (0, 16, 64, longest):
        memory = distance + len(question) + 1  # the "." follows the key
        monkeypatch.setattr(probes, "score_sequences", scorer(memory))
        rows = probes.passkey(pretrained(LONG), text_tokens(500), num_keys=7)
        assert [row["distance"] for row in rows] == [0, 16, 32, 64, 128, longest]
        for row in rows:
            if row["distance"] == distance:
                assert (row["nats_per_token"], row["recalled"]) == (0, 1)
                assert row["other_key_nats_per_token"] > 1
            else:
                assert (row["nats_per_token"] > 1, row["recalled"]) == (True, 0)


def test_a_window_too_short_for_a_pass_key_is_refused():
    with pytest.raises(ValueError, match="the 14 tokens of a window are too few"):
        probes.passkey(pretrained(), text_tokens(60))


def test_repeated_tokens_are_scored_apart_from_the_first_ones(monkeypatch):
    for length in (4, 16, 100):
        monkeypatch.setattr(probes, "score_sequences", scorer(memory=length))
        for row in probes.repetition(pretrained(LONG), num_sequences=3):
            if row["length"] == length:
                assert (row["second_nats_per_token"], row["recalled"]) == (0, 1)
                assert row["first_nats_per_token"] == row["in_context_score"] > 1.8
            else:
                assert row["recalled"] < 0.2
    assert [row["length"] for row in probes.repetition(pretrained(LONG))] == [4, 8, 16, 32, 64, 100]


def test_distinct_and_repetition_of_texts_that_are_known():
    assert distinct([[1, 2, 1, 2]], 1) == 2 / 4
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct([[1]], 2) == 0
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4], 4) == 1 - 4 / 5
    assert repeated_share([7] * 10, 4) == 1 - 1 / 7
    assert repeated_share([1, 2], 4) == 0


@pytest.mark.parametrize("name", POLICIES)
def test_new_tokens_are_scored_as_in_one_pass_while_latents_are_left(name):
    tokens_BS = random_tokens(CONFIG, 13)
    params, model = random_params(CONFIG), PerceiverAR(CONFIG)
    sizes = {"prompt_len": 9, "num_latents": 2}
    measure = functools.partial(nats_of_new_tokens, model=model, policy=POLICIES[name], **sizes)
    measured = quick_jit(measure)(params, tokens_BS)
    logits_BLV = quick_jit(model.apply, static_argnums=2)({"params": params}, tokens_BS[:, :12], 7)
    log_probs = np.asarray(jax.nn.log_softmax(logits_BLV))[:, 1:]  # the last of the prompt, 3 more
    by_hand = -np.take_along_axis(log_probs, tokens_BS[:, 9:, None], axis=2)[..., 0]
    np.testing.assert_allclose(measured, by_hand, rtol=1e-4)


def test_every_policy_and_search_gets_a_row(monkeypatch):
    monkeypatch.delitem(POLICIES, "recompute")  # every policy is a minute of compiling
    monkeypatch.delitem(POLICIES, "reset")
    monkeypatch.delitem(SEARCHES, "top_p")
    rows = generation_quality(pretrained(), text_tokens(200), num_prompts=2, num_new=8)
    assert (rows[0]["policy"], "held_out_nats_per_token" in rows[0]) == ("text", False)
    assert [row["search"] for row in rows] == ["text", "greedy", "sampled"]
    _, greedy, sampled = rows
    assert greedy["held_out_nats_per_token"] == sampled["held_out_nats_per_token"]
    assert greedy["distinct_1"] < sampled["distinct_1"] <= 1
    with pytest.raises(ValueError, match="fewer than 16 prompts of 7 with 6 after each"):
        generation_quality(pretrained(), text_tokens(200))


def test_a_probe_is_one_command(tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, random_params(CONFIG), tokenizer=BYTES)
    (tmp_path / "text.txt").write_text(BYTES.decode(text_tokens(300).tolist()))
    output, text = tmp_path / "result.json", f"--text={tmp_path / 'text.txt'}"
    command = [sys.executable, "evaluate.py", f"--model={tmp_path / 'model'}", text]
    command += ["--probe=prefix", f"--output={output}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [row["prefix"] for row in json.loads(output.read_text())["prefix"]] == [0, 8]
    assert json.loads(done.stdout) == json.loads(output.read_text())
    drawn = subprocess.run([sys.executable, "tools/plot_evaluation.py", output], cwd=ROOT)
    assert drawn.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "pass --text, --probe or --tasks"),
        (["--text=x", "--tasks=x"], "pass --text, --probe or --tasks"),
        (["--probe=x"], "--probe=x is not one of prefix, passkey, repetition, generation"),
        (["--probe=prefix"], "--probe=prefix takes a --text"),
        (["--probe=repetition", "--text=x"], "--probe=repetition takes no --text"),
        (["--text=x", "--output=no/such/folder"], "--output=no/such/folder: there is no such"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        evaluate._check(evaluate._parser().parse_args(["--model=x", *arguments]))
