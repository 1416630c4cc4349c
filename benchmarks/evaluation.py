"""CPU time of scoring a window, and of a training step on one, in turn; JSON.

    taskset -c 1 python benchmarks/evaluation.py --channels 256 --layers 4

The model has c4_base's vocabulary and lengths unless told otherwise, and is as narrow as asked.
Prints the median over rounds of each, in seconds per window, and of their ratio.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import numpy as np
from processor import processor

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.training import (
    Batch,
    OptimizerConfig,
    TrainState,
    make_optimizer,
    token_log_probs,
    train_step,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = PerceiverARConfig(
        vocab_size=args.vocab,
        max_seq_len=args.length,
        max_latents=args.latents,
        num_channels=args.channels,
        num_heads=args.heads,
        num_self_attention_layers=args.layers,
        num_self_attention_rotary_layers=-1,
        cross_attention_dropout=0.0,
        abs_pos_emb=False,
        output_norm=True,
        output_bias=False,
    )
    model = PerceiverAR(config)
    options = {"model": model, "prefix_len": config.max_prefix_len}
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=100))
    state = TrainState.create(params=init_params(model, jax.random.key(0)), tx=tx)
    rows = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length + 1))
    rows = rows.astype(np.int32)
    batch = Batch(rows[:, :-1], rows[:, 1:], np.zeros((args.batch, args.length), bool))
    score = jax.jit(functools.partial(token_log_probs, **options))
    step = jax.jit(functools.partial(train_step, key=jax.random.key(0), **options))
    times = [(_seconds(score, state.params, batch), _seconds(step, state, batch))
             for _ in range(1 + args.rounds)][1:]  # fmt: skip
    medians = [statistics.median(x) / args.batch for x in zip(*times, strict=True)]
    result = {
        "processor": processor(),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "cpu_seconds_per_window": dict(zip(("evaluation", "training"), medians, strict=True)),
        "ratio": statistics.median(x / y for x, y in times),
    }
    print(json.dumps(vars(args) | result))


def _seconds(function, *arguments) -> float:
    start = time.process_time()
    jax.block_until_ready(function(*arguments))
    return time.process_time() - start


if __name__ == "__main__":
    main()
