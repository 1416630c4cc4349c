"""How well a model predicts a text, in a run and from the command line."""

import functools
import json
import math
import types

import jax
import numpy as np
import pytest
from sharded_training import CONFIG, evaluation_batches
from small_models import quick_jit, random_params, small_config
from small_runs import metrics, small_run, train, write_text

from perceiver_ar_jax import PerceiverAR, load_pretrained, train_loop
from perceiver_ar_jax.commands import evaluate as evaluate_command
from perceiver_ar_jax.data import DataConfig, EvaluationBatches
from perceiver_ar_jax.data import evaluation_batches as read_batches
from perceiver_ar_jax.evaluation import Evaluation, evaluate, evaluate_in_detail, progress
from perceiver_ar_jax.evaluation.batch_size import bytes_per_window, default_batch_size
from perceiver_ar_jax.pretrained import save_pretrained
from perceiver_ar_jax.tokenizers import ByteTokenizer
from perceiver_ar_jax.training import Batch, token_log_probs


def text_batches(folder, config, text="The river runs, and often.", *, stride=None, **data):
    (folder / "text.txt").write_text(text)
    data = {"source": str(folder / "text.txt"), "min_seq_len": 1, "batch_size": 3} | data
    data = DataConfig(max_seq_len=config.max_seq_len, **data)
    return read_batches(data, ByteTokenizer(), num_latents=config.max_latents, stride=stride)


@pytest.mark.parametrize("stride", [1, 4, None])
def test_strided_scores_are_those_of_reading_token_by_token(tmp_path, stride):
    config = small_config(vocab_size=262)
    params, model = random_params(config), PerceiverAR(config)
    batches = text_batches(tmp_path, config, stride=stride)
    tokens = np.array([2, *ByteTokenizer().encode("The river runs, and often."), 2])
    advance, length = stride or config.max_latents, config.max_seq_len
    rows, targets = [], tokens[1:]
    for i in range(len(targets)):  # reads tokens[: i + 1]; what comes after is not known yet
        end = min((i // advance + 1) * advance, len(targets))
        row = np.where(np.arange(end) <= i, tokens[:end], 0)
        rows.append(np.pad(row, (length, 0), constant_values=-1)[-length:])
    rows = np.array(rows)
    logits_NLV = quick_jit(model.apply, static_argnums=2)(
        {"params": params}, np.maximum(rows, 0), config.max_prefix_len, rows < 0
    )
    last = [np.minimum((i // advance + 1) * advance, len(targets)) - i for i in range(len(targets))]
    log_probs_NV = jax.nn.log_softmax(logits_NLV)[np.arange(len(rows)), -np.array(last)]
    nats = -np.asarray(log_probs_NV)[np.arange(len(rows)), targets]
    result = evaluate_in_detail(params, batches, model=model)
    np.testing.assert_allclose(result.loss, np.mean(nats), rtol=1e-5)
    for row in result.tables["by_position"]:
        expected = np.mean(nats[row["from"] : row["to"] + 1])
        np.testing.assert_allclose(row["nats_per_token"], expected, rtol=1e-5)
    np.testing.assert_allclose(evaluate(params, batches, model=model).loss, result.loss, rtol=1e-6)


def test_tables_cover_every_token_and_words_and_bytes_are_those_of_the_text(tmp_path):
    config = small_config(vocab_size=262)
    batches = text_batches(tmp_path, config, "Größe, und\n zwei.", respect_documents=True)
    result = evaluate_in_detail(random_params(config), batches, model=PerceiverAR(config))
    assert (result.num_tokens, result.num_bytes, result.num_words) == (20, 19, 3)
    assert set(result.tables) == {"by_position", "by_context", "by_prefix"}
    assert result.tables["by_context"][-1]["to"] == config.max_seq_len
    for table in result.tables.values():
        assert sum(row["tokens"] for row in table) == 20
        nats = sum(row["tokens"] * row["nats_per_token"] for row in table)
        np.testing.assert_allclose(nats, 20 * result.loss, rtol=1e-6)
    np.testing.assert_allclose(np.log(result.word_perplexity), 20 * result.loss / 3)
    np.testing.assert_allclose(result.bits_per_byte, 20 * result.loss / np.log(2) / 19)


def test_progress_counts_batches_that_are_scored_and_not_those_read_ahead(tmp_path):
    config, sizes = small_config(vocab_size=262), []
    batches = text_batches(tmp_path, config)

    def track(results):
        for nats_K in results:
            sizes.append(len(nats_K))
            yield nats_K

    params = random_params(config)
    result = evaluate_in_detail(params, batches, model=PerceiverAR(config), track=track)
    assert len(sizes) == len(batches) > 1
    assert sum(sizes) == result.num_tokens


def test_a_perplexity_of_words_beyond_floats_is_infinite():
    assert Evaluation(10.0, num_tokens=100, num_bytes=100, num_words=1).word_perplexity == math.inf
    assert Evaluation(1.0, num_tokens=1, num_bytes=1, num_words=0).word_perplexity == math.inf


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vocab_size": 5000, "max_seq_len": 96, "max_latents": 64},
        {"num_heads": 16, "num_channels": 64, "max_seq_len": 512, "max_latents": 256},
        {"num_channels": 256, "max_seq_len": 512, "max_latents": 16},
    ],
)
def test_the_memory_of_a_window_is_estimated_from_above(changes):
    config = small_config(**changes)
    rows = 8
    batch = Batch.abstract(rows, config.max_seq_len, with_segment_ids=False)
    step = functools.partial(
        token_log_probs, model=PerceiverAR(config), prefix_len=config.max_prefix_len
    )
    compiled = jax.jit(step).lower(random_params(config), batch).compile()
    used = compiled.memory_analysis().temp_size_in_bytes / rows
    assert used <= bytes_per_window(config, config.max_seq_len) <= 8 * used


def test_a_batch_fills_half_of_an_accelerators_free_memory():
    config = small_config()
    window = bytes_per_window(config, config.max_seq_len)

    def device(free):
        stats = {"bytes_limit": free + 10**6, "bytes_in_use": 10**6}
        return types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

    assert default_batch_size(config, device=device(2 * 7 * window)) == 7
    assert default_batch_size(config, device=device(window)) == 1


def test_progress_is_told_on_standard_error_with_an_eta(monkeypatch, capsys):
    seconds = iter([0.0, 9.0, 14.0, 20.0, 26.0])  # 9 s to compile
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert list(progress.tracked("abcd", 10, "batches")) == list("abcd")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["batches: 2/10  ETA 0:00:40", "batches: 4/10  ETA 0:00:34"]


@pytest.mark.parametrize("respect_documents", [True, False])
def test_evaluate_gives_the_loss_of_the_run(respect_documents, tmp_path, capsys):
    text = write_text(tmp_path)
    config = small_run(text, steps=1, data={"respect_documents": respect_documents})
    assert train(config, tmp_path / "run") == train_loop.DONE
    expected = [line["eval/loss"] for line in metrics(tmp_path / "run") if "eval/loss" in line][-1]
    output = tmp_path / "result.json"
    flags = [f"--model={tmp_path / 'run'}", f"--text={text}", "--split=validation"]
    flags += [f"--output={output}"]
    capsys.readouterr()
    assert evaluate_command.main(flags) == 0
    line = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(line["nats_per_token"], expected, rtol=1e-6)
    assert line["respect_documents"] == respect_documents
    written = json.loads(output.read_text())
    assert {name: x for name, x in written.items() if name in line} == line
    assert sum(row["tokens"] for row in written["by_context"]) == line["tokens"]


def test_a_saved_model_says_whether_it_respects_documents(tmp_path):
    config = small_config()
    for respect_documents in (True, False):
        folder = tmp_path / str(respect_documents)
        save_pretrained(folder, config, random_params(config), respect_documents=respect_documents)
        assert load_pretrained(folder).respect_documents == respect_documents


def test_a_token_that_is_not_counted_once_is_an_error(monkeypatch):
    monkeypatch.setattr(EvaluationBatches, "__len__", lambda self: 1)
    with pytest.raises(RuntimeError, match="add up to 48, but the text has 4800 tokens"):
        evaluate(random_params(CONFIG), evaluation_batches(), model=PerceiverAR(CONFIG))
