"""How well a model predicts a text, in a run and from the command line."""

import json
import sys

import numpy as np
import pytest
from sharded_training import CONFIG, evaluation_batches
from small_models import random_params, small_config
from small_runs import metrics, small_run, train, write_text

import evaluate as evaluate_script
from perceiver_ar_jax import PerceiverAR, load_pretrained, train_loop
from perceiver_ar_jax.data import EvaluationBatches
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.pretrained import save_pretrained


@pytest.mark.parametrize("respect_documents", [True, False])
def test_evaluate_gives_the_loss_of_the_run(respect_documents, tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path)
    config = small_run(text, steps=1, data={"respect_documents": respect_documents})
    assert train(config, tmp_path / "run") == train_loop.DONE
    expected = [line["eval/loss"] for line in metrics(tmp_path / "run") if "eval/loss" in line][-1]
    flags = [f"--model={tmp_path / 'run'}", f"--text={text}", "--split=validation"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    capsys.readouterr()
    assert evaluate_script.main() == 0
    line = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(line["nats_per_token"], expected, rtol=1e-6)
    assert line["respect_documents"] == respect_documents


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
