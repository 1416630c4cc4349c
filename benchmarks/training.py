"""A training step beside perceiver-io's, a step of each in turn; prints JSON.

    taskset -c 0 python benchmarks/training.py --models tiny bytes_small clm_base
    python benchmarks/training.py --contenders "ours float32" "ours bfloat16"

A full step: forward, backward, clipping, AdamW; plain SGD for clm_base, where AdamW's moments
would take 7 GB more. Contenders get the same batches. perceiver-io runs eagerly, in float32 or
under torch's bfloat16 autocast. Prints one JSON object per model:

    seconds          the fastest step: CPU time on one core (taskset), which other work on the
                     machine hardly changes, otherwise wall time on all cores
    ratio            perceiver-io's seconds to ours, the median over rounds
    spread           of seconds over rounds: half their interquartile range, to their median
    of_peak          FLOP/s of the model's matmuls to those of one large float32 matmul
    compile_seconds  CPU time of tracing and compiling our step
    temporaries_mib  memory of our step beside its arguments and results
    peak_mib         resident memory of a process of its own, with --memory

Needs what requirements-parity.txt says, unless no contender is perceiver-io.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "")  # not those of the tests, which compile quickly
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from perceiver_ar_jax.command_line import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # as train.py does; it serves both contenders

import jax
import numpy as np
import optax
from processor import conditions
from timing import CLOCK, CORES, matmul_flops_per_second, ratios, spread

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.model.flops import training_flops
from perceiver_ar_jax.training import Batch, OptimizerConfig, TrainState, make_optimizer, train_step

CONTENDERS = ("perceiver-io float32", "perceiver-io autocast", "ours float32", "ours bfloat16")
SETTINGS = OptimizerConfig(learning_rate=1e-4, warmup_steps=1, total_steps=1000)
MODELS = {  # and windows per batch
    "tiny": (
        PerceiverARConfig.clm_base(
            vocab_size=262, num_channels=256, num_heads=4, num_self_attention_layers=4
        ),
        4,
    ),
    "bytes_small": (PerceiverARConfig.bytes_small(cross_attention_dropout=0.0), 2),
    "clm_base": (PerceiverARConfig.clm_base(), 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--batch", type=int, help="windows (default: 4, 2 and 1)")
    parser.add_argument("--layers", type=int, help="fewer, where memory is short")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--optimizer", choices=("adamw", "sgd"))
    parser.add_argument("--memory", action="store_true", help="measure peak_mib, two steps of each")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of the reference's libraries
    for model in args.models:
        print(json.dumps(measure(model, args)), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict:
    config, batch_size = MODELS[name]
    batch_size = args.batch or batch_size
    if args.layers is not None:
        config = config.replace(num_self_attention_layers=args.layers)
    optimizer = args.optimizer or ("sgd" if name == "clm_base" else "adamw")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, config.vocab_size, (batch_size, config.max_seq_len + 1))
    steps, of_program = {}, {}
    theirs = [c for c in args.contenders if c.startswith("perceiver-io")]
    if theirs:
        steps |= reference_steps(theirs, config, optimizer, rows)
    for number, contender in enumerate(c for c in args.contenders if c.startswith("ours")):
        if number == 0:
            state = [our_state(config, optimizer)]  # shared: each step donates it
        dtype = contender.split()[1]
        steps[contender], of_program[contender] = our_step(state, config.replace(dtype=dtype), rows)
    losses = {contender: step() for contender, step in steps.items()}  # and warms up
    seconds = {contender: [] for contender in steps}
    peaks = []
    for number in range(args.rounds):
        peaks.append(matmul_flops_per_second())
        for contender, step in sorted(steps.items(), reverse=number % 2 == 1):
            begin = CLOCK()
            step()
            seconds[contender].append(CLOCK() - begin)
    best = {contender: min(times) for contender, times in seconds.items()}
    flops = batch_size * training_flops(config, config.max_prefix_len, config.max_latents)
    result = {
        "model": name,
        "parameters": sum(x.size for x in jax.tree.leaves(abstract_params(config))),
        "batch": batch_size,
        "layers": config.num_self_attention_layers,
        "optimizer": optimizer,
        **conditions(),
        "clock": CLOCK.__name__,
        "rounds": args.rounds,
        "first_losses": {contender: round(loss, 4) for contender, loss in losses.items()},
        "seconds": {contender: round(time, 4) for contender, time in best.items()},
        "spread": {contender: round(spread(times), 3) for contender, times in seconds.items()},
        "ratio": {reference: median_ratios(seconds, reference) for reference in theirs},
        "matmul_gflops": round(max(peaks) / 1e9, 1),
        "of_peak": {c: round(flops / time / max(peaks), 3) for c, time in best.items()},
        **{
            key: {contender: values[key] for contender, values in of_program.items()}
            for key in ("compile_seconds", "temporaries_mib")
        },
    }
    if args.memory:
        steps.clear()
        result["peak_mib"] = (
            {args.contenders[0]: peak_mib()}
            if len(args.contenders) == 1
            else {c: peak_of_own_process(name, c) for c in args.contenders}
        )
    return result


def median_ratios(seconds: dict, reference: str) -> dict:
    return {
        contender: round(statistics.median(ratios(seconds[reference], times)), 3)
        for contender, times in seconds.items()
        if contender.startswith("ours")
    }


def abstract_params(config):
    return jax.eval_shape(lambda: init_params(PerceiverAR(config), jax.random.key(0)))


def our_state(config, optimizer):
    tx = optax.sgd(1e-4) if optimizer == "sgd" else make_optimizer(SETTINGS)

    @jax.jit
    def begin(key):
        return TrainState.create(params=init_params(PerceiverAR(config), key), tx=tx)

    return begin(jax.random.key(0))


def our_step(state: list, config, rows):
    """One more step of the state in the list, and what is known of its program."""
    rows = rows.astype(np.int32)
    pads = np.zeros((len(rows), config.max_seq_len), bool)
    batch = jax.device_put(Batch(tokens=rows[:, :-1], targets=rows[:, 1:], pad_mask=pads))
    run = functools.partial(
        train_step,
        model=PerceiverAR(config),
        prefix_len=config.max_prefix_len,
        key=jax.random.key(0),
    )
    begin = time.process_time()
    compiled = jax.jit(run, donate_argnums=0).lower(state[0], batch).compile()
    seconds = time.process_time() - begin

    def step() -> float:
        state[0], metrics = compiled(state[0], batch)
        jax.block_until_ready(state[0])
        return float(metrics["loss"])

    temporaries = compiled.memory_analysis().temp_size_in_bytes >> 20
    return step, {"compile_seconds": round(seconds, 2), "temporaries_mib": temporaries}


def reference_steps(contenders, config, optimizer, rows):
    """A step of perceiver-io for each contender, all of the same model and optimizer."""
    from reference import clm, reference_config, reference_training, torch

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    model = clm.CausalLanguageModel(reference_config(config)).train()
    train = sgd_training(model) if optimizer == "sgd" else reference_training(model, SETTINGS)
    pads = np.zeros((len(rows), config.max_seq_len), bool)

    def step(autocast: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return train(rows[:, :-1], rows[:, 1:], config.max_prefix_len, pads)

    return {name: functools.partial(step, name.endswith("autocast")) for name in contenders}


def sgd_training(model):
    """As `reference_training`, with plain SGD."""
    from reference import reference_loss, torch

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(tokens, targets, prefix_len, pads) -> float:
        optimizer.zero_grad()
        loss = reference_loss(model, tokens, targets, prefix_len, pads)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def peak_mib() -> int:
    """Peak resident memory since the program began; getrusage counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def peak_of_own_process(model: str, contender: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--models", model, "--rounds", "1"]
    command += ["--contenders", contender]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["peak_mib"][contender]


if __name__ == "__main__":
    main()
