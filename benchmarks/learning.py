"""Our model and perceiver-io's learn side by side: same weights, same batches; writes JSON.

    python benchmarks/learning.py --text FILE --output learning.json
    python tools/draw_learning.py learning.json

Byte models of 4 million parameters in float32, trained as perceiver-io trains (AdamW, its schedule,
clipping), a step of each in turn on one core. Seconds are CPU time of the steps, without our
compilation, which is given apart. Needs what requirements-parity.txt says.
"""

import argparse
import functools
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "")  # not those of the tests, which compile quickly
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from perceiver_ar_jax.command_line import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # as train.py does; it serves both

import jax
import numpy as np
from processor import processor
from reference import clm, our_model, reference_config, reference_training, torch

from perceiver_ar_jax import PerceiverARConfig
from perceiver_ar_jax.tokenizers import load_tokenizer
from perceiver_ar_jax.training import Batch, OptimizerConfig, TrainState, make_optimizer, train_step

CONFIG = PerceiverARConfig(
    vocab_size=262,
    max_seq_len=1024,
    max_latents=512,
    num_channels=256,
    num_heads=4,
    num_self_attention_layers=4,
    cross_attention_dropout=0.0,
    abs_pos_emb=False,
    output_norm=True,
    output_bias=False,
)
PREFIX_LEN = CONFIG.max_seq_len - CONFIG.max_latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--core", type=int, default=0, help="that the process is pinned to")
    parser.add_argument("--output", type=Path, required=True, help="rewritten every 20 steps")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    warnings.simplefilter("ignore")  # of the reference's libraries
    text_T = np.asarray(load_tokenizer("bytes").encode(args.text.read_text()), np.int32)
    settings = OptimizerConfig(
        learning_rate=1e-3, warmup_steps=args.steps // 20, total_steps=args.steps
    )
    torch.manual_seed(0)
    theirs = clm.CausalLanguageModel(reference_config(CONFIG))
    model, params = our_model(theirs.eval(), CONFIG)
    steps = {"perceiver-io": reference_training(theirs.train(), settings)}
    steps["ours"], compile_seconds = our_training(model, params, settings, args.batch)
    losses = {name: [] for name in steps}
    seconds = {name: [] for name in steps}
    result = {
        "processor": processor(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "targets_per_step": args.batch * CONFIG.max_latents,
        "compile_seconds": compile_seconds,
        "losses": losses,
        "seconds": seconds,
    }
    rng = np.random.default_rng(0)
    for number in range(args.steps):
        starts_B1 = rng.integers(0, len(text_T) - CONFIG.max_seq_len, (args.batch, 1))
        rows_BS = text_T[starts_B1 + np.arange(CONFIG.max_seq_len + 1)]
        pads_BS = np.zeros((args.batch, CONFIG.max_seq_len), bool)
        tokens_BS, targets_BS = rows_BS[:, :-1].astype(np.int64), rows_BS[:, 1:].astype(np.int64)
        for name, step in sorted(steps.items(), reverse=number % 2 == 1):
            begin = time.process_time()
            losses[name].append(step(tokens_BS, targets_BS, PREFIX_LEN, pads_BS))
            seconds[name].append(round(time.process_time() - begin, 4))
        if number % 20 == 19 or number + 1 == args.steps:
            args.output.write_text(json.dumps(result) + "\n")
            last = {name: round(float(np.mean(values[-20:])), 4) for name, values in losses.items()}
            print(f"step {number + 1}/{args.steps}", last, flush=True)
    ratios = np.divide(seconds["ours"], seconds["perceiver-io"])
    difference = np.abs(np.subtract(losses["ours"], losses["perceiver-io"]))
    print(
        json.dumps(
            {
                "median_seconds": {name: float(np.median(s)) for name, s in seconds.items()},
                "median_ratio": float(np.median(ratios)),
                "largest_loss_difference": float(difference.max()),
                "mean_loss_difference_of_last_20": float(difference[-20:].mean()),
            },
            indent=2,
        )
    )


def our_training(model, params, settings, batch):
    """One more step of our training, as `reference_training` has it, and seconds of compiling."""
    state = TrainState.create(params=params, tx=make_optimizer(settings))
    run = functools.partial(train_step, model=model, prefix_len=PREFIX_LEN, key=jax.random.key(0))
    shape = Batch.abstract(batch, CONFIG.max_seq_len, with_segment_ids=False).replace(weights=None)
    begin = time.process_time()
    compiled = jax.jit(run, donate_argnums=0).lower(state, shape).compile()
    compile_seconds = round(time.process_time() - begin, 2)

    def step(tokens, targets, prefix_len, pads) -> float:
        nonlocal state
        tokens, targets = tokens.astype(np.int32), targets.astype(np.int32)
        state, metrics = compiled(state, Batch(tokens=tokens, targets=targets, pad_mask=pads))
        return float(metrics["loss"])

    return step, compile_seconds


if __name__ == "__main__":
    main()
