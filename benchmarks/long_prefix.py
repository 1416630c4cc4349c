"""Memory and time of a training step by length of the prefix, beside perceiver-io; prints JSON.

    python benchmarks/long_prefix.py --lengths 131072 1048576 16777216
    python benchmarks/long_prefix.py --models streamed whole dense reference \
        --lengths 4096 16384 65536

A full optimizer step (forward, backward, AdamW) in float32 of 256 channels, 8 heads, 4 layers and
512 latents, batch 1, rotary positions alone. Each figure comes from a process of its own, pinned to
one core: the peak of its resident memory (imports and libraries included), and the CPU time of the
fastest of `--steps` steps. `streamed` has `prefix_chunk` set, `whole` has not; `dense` is the
decoder of the same layers in which every position is a latent, with all that saves memory (remat,
attention that computes its weights again).

The compiler takes more memory than a short step. With `--compilation_cache=FOLDER` a second call
measures the step without it, as a run that is started again has it. A process that would take more
than `--limit_gb` is ended, and its entry says so.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
import warnings

from processor import conditions

MODELS = ("streamed", "whole", "dense", "reference", "reference_checkpointed")
LATENTS = 512


def main() -> None:
    options = _options()
    if options.child:
        print(json.dumps(measure(options.models[0], options.lengths[0], options)))
        return
    entries = []
    for length in options.lengths:
        for model in options.models:
            entries.append({"model": model, "prefix": length} | in_own_process(model, length))
            print(json.dumps(entries[-1]), file=sys.stderr, flush=True)
    print(json.dumps(conditions() | {"entries": entries}, indent=2))


def in_own_process(model: str, length: int) -> dict:
    """What a child process prints of one step, or why there is nothing."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    command += ["--models", model, "--lengths", str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"failed": f"exit code {done.returncode}: {last[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, length: int, options: argparse.Namespace) -> dict:
    """CPU seconds of the fastest step, and the peak of resident memory in MiB."""
    limit = int(options.limit_gb * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.sched_setaffinity(0, {options.core})
    os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.simplefilter("ignore")
    if model.startswith("reference"):
        step = reference_step(length, checkpointing=model == "reference_checkpointed")
    else:
        step = our_step(model, length, options)
    seconds = []
    for _ in range(options.steps):
        begin = time.process_time()
        loss = step()
        seconds.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(min(seconds), 3), "peak_mib": round(peak), "loss": loss}


def our_step(name: str, length: int, options: argparse.Namespace):
    """A function that takes one more step of our model and returns its loss."""
    import jax
    import numpy as np

    from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
    from perceiver_ar_jax.model import init_params
    from perceiver_ar_jax.training import (
        Batch,
        OptimizerConfig,
        TrainState,
        make_optimizer,
        train_step,
    )

    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = PerceiverARConfig(**_architecture(length), cross_attention_dropout=0.0)
    changes = {
        "streamed": {"prefix_chunk": options.chunk},
        "whole": {},
        "dense": {"max_latents": config.max_seq_len, "remat": "full", "attention": "recompute"},
    }
    model = PerceiverAR(config.replace(**changes[name]))
    prefix_len = config.max_seq_len - model.config.max_latents
    tx = make_optimizer(OptimizerConfig(learning_rate=3e-4, warmup_steps=1, total_steps=100))

    @jax.jit
    def begin(key):
        return TrainState.create(params=init_params(model, key), tx=tx)

    tokens_BS = _tokens(length)
    pads_BS = np.zeros(tokens_BS.shape, bool)
    batch = jax.device_put(Batch(tokens=tokens_BS, targets=tokens_BS, pad_mask=pads_BS))
    state = begin(jax.random.key(0))
    run = functools.partial(train_step, model=model, prefix_len=prefix_len, key=jax.random.key(1))
    compiled = jax.jit(run, donate_argnums=0).lower(state, batch).compile()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return step


def reference_step(length: int, *, checkpointing: bool):
    """The same of perceiver-io's model, with AdamW of PyTorch."""
    import torch
    from perceiver.model.text.clm import CausalLanguageModel, CausalLanguageModelConfig

    torch.set_num_threads(1)
    model = CausalLanguageModel(
        CausalLanguageModelConfig(
            **_architecture(length),
            cross_attention_dropout=0.0,
            activation_checkpointing=checkpointing,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    tokens_BS = torch.tensor(_tokens(length), dtype=torch.long)

    def step():
        optimizer.zero_grad()
        logits = model(tokens_BS, prefix_len=length)
        logits = getattr(logits, "logits", logits)
        targets = tokens_BS[:, length:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def _architecture(length):
    return {
        "vocab_size": 262,
        "max_seq_len": length + LATENTS,
        "max_latents": LATENTS,
        "num_channels": 256,
        "num_heads": 8,
        "num_self_attention_layers": 4,
        "abs_pos_emb": False,
    }


def _tokens(length):
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (1, length + LATENTS), dtype=np.int32)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["streamed"])
    add("--lengths", nargs="+", type=int, default=[131_072])
    add("--chunk", type=int, default=1024, help="prefix_chunk of the streamed model")
    add("--steps", type=int, default=2)
    core = min(os.sched_getaffinity(0))
    add("--core", type=int, default=core, help="that the processes are pinned to")
    add("--limit_gb", type=float, default=20.0, help="of memory for each process")
    add("--compilation_cache", default="", help="a folder")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
