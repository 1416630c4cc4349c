"""Scoring a window beside a training step on one, in turn; prints JSON.

    taskset -c 1 python benchmarks/evaluation.py --channels 256 --layers 4
    taskset -c 1 python benchmarks/evaluation.py --channels 1280 --heads 10 --layers 20 \\
        --optimizer sgd --batch 2 --rounds 3

The model has c4_base's vocabulary and lengths unless told otherwise, and is as narrow as asked.
Prints the median over rounds of each, in seconds per window, and of their ratio. On one core it is
CPU time, otherwise wall time. With plain SGD there are no moments, which take 8 bytes per
parameter.
"""

import argparse
import functools
import json
import statistics

import jax
import numpy as np
import optax
from processor import conditions
from timing import ratios, spread, timed

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
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
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
    settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=100)
    tx = make_optimizer(settings) if args.optimizer == "adamw" else optax.sgd(1e-3)

    @jax.jit
    def begin(key):
        return TrainState.create(params=init_params(model, key), tx=tx)

    state = begin(jax.random.key(0))
    rows = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length + 1))
    rows = rows.astype(np.int32)
    batch = Batch(rows[:, :-1], rows[:, 1:], np.zeros((args.batch, args.length), bool))
    batch = jax.device_put(batch)
    score = jax.jit(functools.partial(token_log_probs, **options))
    run = functools.partial(train_step, key=jax.random.key(0), **options)
    run = jax.jit(run, donate_argnums=0)

    def step():
        nonlocal state
        state, metrics = run(state, batch)
        return state, metrics

    seconds = {"evaluation": [], "training": []}
    for number in range(1 + args.rounds):
        times = timed(score, state.params, batch), timed(step)
        if number:  # the first compiles
            for name, time in zip(seconds, times, strict=True):
                seconds[name].append(time / args.batch)
    ratio = ratios(seconds["evaluation"], seconds["training"])
    result = conditions() | {
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "seconds_per_window": {name: statistics.median(x) for name, x in seconds.items()},
        "spread": {name: round(spread(x), 3) for name, x in seconds.items()},
        "ratio": statistics.median(ratio),
        "ratio_spread": round(spread(ratio), 3),
    }
    print(json.dumps(vars(args) | result))


if __name__ == "__main__":
    main()
