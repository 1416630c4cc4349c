"""lm-evaluation-harness over our models: without a network, on tasks made here."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT
from small_models import random_params, small_config

from perceiver_ar_jax import PerceiverAR, evaluation, generate
from perceiver_ar_jax.evaluation import scores
from perceiver_ar_jax.pretrained import Pretrained, save_pretrained
from perceiver_ar_jax.tokenizers import ByteTokenizer
from perceiver_ar_jax.training import Batch, token_log_probs

WITHOUT_LM_EVAL = "lm-eval is not installed"
needs_lm_eval = pytest.mark.skipif(not find_spec("lm_eval"), reason=WITHOUT_LM_EVAL)
BYTES = ByteTokenizer()
EOS = BYTES.eos_id
CONFIG = small_config(vocab_size=262)


def pretrained(config=CONFIG, seed=0, respect_documents=False) -> Pretrained:
    params = random_params(config, seed)
    return Pretrained(PerceiverAR(config), params, config, BYTES, 0, respect_documents)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("lm_eval", reason=WITHOUT_LM_EVAL)
    return evaluation.HarnessLM(pretrained())


def log_probs_by_hand(tokens, count, config=CONFIG, params=None, segment_ids=None):
    """One window a call, the scored targets of each at most max_latents."""
    params = random_params(config) if params is None else params
    found = []
    for first in range(len(tokens) - count, len(tokens), config.max_latents):
        last = min(first + config.max_latents, len(tokens))
        window = np.array(tokens[max(0, last - 1 - config.max_seq_len) : last])[None]
        length = window.shape[1] - 1
        batch = Batch(window[:, :-1], window[:, 1:], np.zeros((1, length), bool), segment_ids)
        prefix_len = max(0, length - config.max_latents)
        step = jax.jit(token_log_probs, static_argnames=("model", "prefix_len"))
        log_probs_BL = step(params, batch, model=PerceiverAR(config), prefix_len=prefix_len)
        found += log_probs_BL[0, -(last - first) :].tolist()
    return found


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_scores_are_the_log_probabilities_by_hand_whatever_the_batch():
    rng = np.random.default_rng(0)
    sizes = [(2, 1), (7, 3), (7, 6), (14, 6), (15, 6), (16, 1), (40, 31), (9, 0), (1, 0)]
    sequences = [(rng.integers(0, 262, length), count) for length, count in sizes]
    got = scores.score_sequences(pretrained(), sequences, batch_size=1)
    together = scores.score_sequences(pretrained(), sequences, batch_size=5)
    for (tokens, count), one, other in zip(sequences, got, together, strict=True):
        by_hand = log_probs_by_hand(tokens, count)
        np.testing.assert_allclose(one.log_probs, by_hand, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other.log_probs, by_hand, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(one.ranks, other.ranks)


def test_the_rank_of_a_token_counts_the_likelier_ones():
    tokens = BYTES.encode("The river")
    params, config = random_params(CONFIG), CONFIG
    logits_LV = PerceiverAR(config).apply({"params": params}, np.array([tokens[:-1]]), 2)[0]
    ranks = [
        int((row > row[target]).sum()) for row, target in zip(logits_LV, tokens[3:], strict=True)
    ]
    (got,) = scores.score_sequences(pretrained(), [(tokens, 6)])
    np.testing.assert_array_equal(got.ranks, ranks)
    best = int(logits_LV[-1].argmax())
    (got,) = scores.score_sequences(pretrained(), [([*tokens[:-1], best], 1)])
    assert got.ranks == [0]


def test_a_model_that_respects_documents_reads_no_other():
    model = pretrained(respect_documents=True)
    after = BYTES.encode("river")
    (alone,) = scores.score_sequences(model, [(after, 4)])
    (follows,) = scores.score_sequences(model, [([*BYTES.encode("else"), EOS, *after], 4)])
    np.testing.assert_allclose(follows.log_probs, alone.log_probs, rtol=1e-5)


def test_a_sequence_cannot_be_scored_from_its_first_token_on():
    with pytest.raises(ValueError, match="3 of 3 tokens cannot be scored: the first is read"):
        scores.score_sequences(pretrained(), [([5, 6, 7], 3)])


def test_log_likelihoods_are_sums_over_the_continuation(model):
    pairs = [
        ("a river", " runs"),
        ("", "and"),
        ("a ", "b"),
        ("a" * 30, "and then, " * 3),
        ("a", ""),
    ]
    expected = [
        (BYTES.encode("a river runs"), 5),
        ([EOS, *BYTES.encode("and")], 3),
        (BYTES.encode("a b"), 2),  # white space goes to the continuation
        (BYTES.encode("a" * 30 + "and then, " * 3), 30),  # five windows
    ]
    got = model.loglikelihood(requests(*pairs))
    for (log_prob, is_greedy), (tokens, count) in zip(got[:-1], expected, strict=True):
        np.testing.assert_allclose(log_prob, sum(log_probs_by_hand(tokens, count)), rtol=1e-4)
        assert is_greedy is False
    assert got[-1] == (0.0, True)


def test_what_greedy_decoding_gives_is_greedy(model):
    prompt = "a river r"  # six latents, as when it is scored
    text = model._pretrained.generate_text([prompt], max_new_tokens=1, num_latents=6)[0]
    ((_, is_greedy),) = model.loglikelihood(requests((prompt, text)))
    assert is_greedy is True


def test_a_rolling_log_likelihood_scores_every_token_once(model):
    texts = ["The river runs, and often it sees the house.", "a", ""]
    got = model.loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, log_prob in zip(texts, got, strict=True):
        tokens = [EOS, *BYTES.encode(text)]
        np.testing.assert_allclose(log_prob, sum(log_probs_by_hand(tokens, len(text))), rtol=1e-4)


def test_generated_texts_are_those_of_generate_text_up_to_a_stop(model):
    prompts = ["a river", "b", "the yellow house sees", ""]
    tokens = [BYTES.encode(prompt)[-11:] or [EOS] for prompt in prompts]  # 3 of 6 latents are left
    options = {"max_new_tokens": 8, "eos_token_id": EOS, "vocab_size": 262}
    got = model.generate_until(requests(*((p, {"until": [], "max_gen_toks": 8}) for p in prompts)))
    for text, prompt in zip(got, tokens, strict=True):
        options |= {"num_latents": min(3, len(prompt))}
        whole = generate(model._pretrained.model, model._pretrained.params, [prompt], **options)
        new = whole[0, len(prompt) :].tolist()
        assert text == BYTES.decode(new[: new.index(EOS) if EOS in new else None])
    stop = max(got)[-1]
    settings = {"until": [stop, "never"], "max_gen_toks": 8, "temperature": 0.0, "do_sample": False}
    cut = model.generate_until(requests(*((prompt, settings) for prompt in prompts)))
    assert cut == [text.partition(stop)[0] for text in got]


def test_samples_do_not_depend_on_the_batch(model):
    settings = {"until": "\n", "max_gen_toks": 6, "temperature": 0.8, "top_k": 40}
    prompts = ["a river", "b", "c"]
    together = model.generate_until(requests(*((prompt, settings) for prompt in prompts)))
    assert model.generate_until(requests(("a river", settings))) == together[:1]
    greedy = model.generate_until(requests(("a river", {"until": "\n", "max_gen_toks": 6})))
    assert greedy != together[:1]


CHOICE = """
task: our_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""
GENERATED = """
task: our_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/generation.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["#"], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
"""


@needs_lm_eval
def test_two_tasks_run_through_the_real_harness_without_a_network(tmp_path):
    """The answers are what the model prefers or writes, all but one, so that scores are known."""
    model = pretrained()
    save_pretrained(tmp_path / "model", CONFIG, model.params, tokenizer=BYTES)
    choices = [[" one", " two", " six"], [" red", " tan"], [" up", " on", " at", " by"]]
    documents = []
    for question, words in zip(("a river", "b", "the yellow house"), choices, strict=True):
        sums = [sum(log_probs_by_hand(BYTES.encode(question + word), len(word))) for word in words]
        documents.append({"question": question, "choices": words, "answer": int(np.argmax(sums))})
    documents[1]["answer"] ^= 1
    prompts = ["a river", "b", "the house", "and"]
    texts = [model.generate_text([prompt], max_new_tokens=5)[0] for prompt in prompts]
    answers = [
        {"prompt": x, "answer": text.partition("#")[0]}
        for x, text in zip(prompts, texts, strict=True)
    ]
    answers[2]["answer"] += "x"
    for name, lines in (("choice", documents), ("generation", answers)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text(CHOICE.format(folder=tmp_path))
    (tasks / "generation.yaml").write_text(GENERATED.format(folder=tmp_path))

    command = [sys.executable, "evaluate.py", f"--model={tmp_path / 'model'}"]
    command += ["--tasks=our_choice,our_generation", f"--task_folder={tasks}"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["tasks"]
    np.testing.assert_allclose(results["our_choice"]["acc,none"], 2 / 3)
    np.testing.assert_allclose(results["our_generation"]["exact_match,none"], 3 / 4)


def test_a_task_that_does_not_exist_is_named(model, tmp_path, monkeypatch):
    from perceiver_ar_jax.evaluation import harness

    real = harness.TaskManager  # without the harness's own tasks, which take seconds to read
    monkeypatch.setattr(harness, "TaskManager", lambda **options: real(include_defaults=False))
    for folder in (None, str(tmp_path)):
        with pytest.raises(ValueError, match="lm-eval has no task no_such_task"):
            evaluation.evaluate_tasks(model, ["no_such_task"], folder=folder)


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "perceiver_ar_jax.evaluation.harness", raising=False)
    monkeypatch.delattr(evaluation, "harness", raising=False)
    with pytest.raises(ValueError, match=r"HarnessLM needs lm-eval: pip install"):
        evaluation.HarnessLM  # noqa: B018
