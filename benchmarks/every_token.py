"""Training on every token beside training on the latents alone, for equal CPU time; prints JSON.

    python benchmarks/every_token.py --text 'books/*.txt' --seconds 240 --seeds 0 1

Both read the same windows of two times L tokens. `latents` trains on the second half of each, with
the first as its prefix; `every_token` on both halves (`latent_windows=2`), half as many windows per
step, so that a step of either trains as many tokens. They train in turns of 10 steps, and a turn's
CPU time counts for its model. Both are measured on the second halves of held-out windows. The
learning rate falls to zero with the time that a model was given.
"""

import argparse
import functools
import json
import sys
import time

import jax
import numpy as np
from prefix_gain import draw_starts, hold_out, model_config, nats_after, read_text, window_batch
from processor import processor

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.tokenizers import load_tokenizer
from perceiver_ar_jax.training import OptimizerConfig, TrainState, make_optimizer, train_step

TURN = 10  # steps
WINDOWS = {"latents": 1, "every_token": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a file or glob of text, or a TFDS directory")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="windows per step of `latents`")
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU time of each model")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer)
    tokens_T, _ = read_text(args.text, tokenizer)
    runs = [compare(args, tokens_T, tokenizer.vocab_size, seed) for seed in args.seeds]
    about = {"processor": processor(), "jax": jax.__version__, "tokens": len(tokens_T)}
    print(json.dumps(vars(args) | about | {"runs": runs}, indent=1))


def compare(args, tokens_T: np.ndarray, vocab_size: int, seed: int) -> dict:
    """Trains both from the same parameters, in turns."""
    L = args.latents
    config = model_config(args, vocab_size).replace(max_seq_len=2 * L)
    model = PerceiverAR(config)
    params = init_params(model, jax.random.key(seed))
    held_out_W, is_held_out_T = hold_out(len(tokens_T), L, L)
    runs = {
        name: Run(args, seed, model, params, tokens_T, is_held_out_T, windows)
        for name, windows in WINDOWS.items()
    }
    for part in range(1, args.evaluations + 1):
        until = args.seconds * part / args.evaluations
        while behind := [run for run in runs.values() if run.seconds < until]:
            for run in behind:
                run.turn()
        for name, run in runs.items():
            nats = nats_after(model, run.state.params, tokens_T, held_out_W, L, args).mean()
            run.curve.append(
                {
                    "seconds": round(run.seconds, 1),
                    "steps": run.steps,
                    "loss": round(float(nats), 4),
                }
            )
            print(seed, name, run.curve[-1], flush=True, file=sys.stderr)
    return {"seed": seed} | {
        name: {"trained_tokens_per_sec": round(run.tokens_per_sec), "curve": run.curve}
        for name, run in runs.items()
    }


class Run:
    """One model in training."""

    def __init__(self, args, seed, model, params, tokens_T, is_held_out_T, windows: int):
        L = model.config.max_latents
        prefix = (2 - windows) * L
        self._batch = args.batch // windows
        self._batch_of = lambda starts_B: window_batch(
            tokens_T, starts_B + prefix, prefix, windows * L
        )
        draw = argparse.Namespace(
            latents=2 * L, seed=seed, shared_steps=0, steps=100_000, batch=self._batch
        )
        self._starts_IB = draw_starts(draw, is_held_out_T, 0)
        self.tokens_per_step = self._batch * windows * L
        self.steps, self.seconds, self.curve = 0, 0.0, []

        def compiled(total_steps):
            optimizer = OptimizerConfig(
                learning_rate=args.learning_rate,
                warmup_steps=50,
                total_steps=total_steps,
                min_fraction=0.0,
                b2=0.98,
            )
            state = TrainState.create(params=params, tx=make_optimizer(optimizer))
            step = functools.partial(
                train_step, model=model, prefix_len=prefix, key=jax.random.key(0)
            )
            return state, jax.jit(step).lower(state, self._batch_of(self._starts_IB[0])).compile()

        self.state, self._step = compiled(1000)
        self.turn()  # the first steps are slower
        self.seconds = 0.0
        self.turn()
        total_steps = int(args.seconds / self.seconds * TURN)
        self.steps, self.seconds = 0, 0.0
        self.state, self._step = compiled(total_steps)

    @property
    def tokens_per_sec(self) -> float:
        return self.steps * self.tokens_per_step / self.seconds

    def turn(self) -> None:
        begin = time.process_time()
        for starts_B in self._starts_IB[self.steps : self.steps + TURN]:
            self.state, metrics = self._step(self.state, self._batch_of(starts_B))
            float(metrics["loss"])
        self.steps += TURN
        self.seconds += time.process_time() - begin


if __name__ == "__main__":
    main()
