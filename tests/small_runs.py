"""Small training runs, for tests."""

import json
from pathlib import Path

import numpy as np

from perceiver_ar_jax import train_loop
from perceiver_ar_jax.presets import preset
from perceiver_ar_jax.run_config import RunConfig

WORDS = ("the", "a", "of", "river", "house", "yellow", "runs", "sees", "and", "then", "often")


def write_text(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    documents = (" ".join(rng.choice(WORDS, 60)) + "." for _ in range(300))
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder / "text.jsonl"


def small_run(text: Path, **changes):
    config = preset("tiny")
    config.data.source = str(text)
    config.steps = 12
    config.optimizer.total_steps = 12  # the schedule, also of a run that is cut short
    config.log_every = 1
    config.eval_every = 6
    config.checkpoint_every = 6
    config.model.cross_attention_dropout = 0.5
    config.model.residual_dropout = 0.1
    config.update(changes)
    return config


def train(config, workdir: Path) -> int:
    """What train.py does with a config file's settings."""
    return train_loop.run(RunConfig.from_config(config), workdir)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    lines = (line for line in metrics(workdir) if "train/loss" in line)
    return {line["step"]: (line["train/loss"], line["optim/grad_norm"]) for line in lines}
