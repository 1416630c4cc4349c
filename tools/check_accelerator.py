"""Checks and times a TPU or GPU, in one command; writes a JSON that you can send us.

    python tools/check_accelerator.py --output=v5e.json        # 10 to 30 minutes on one device

Every implementation of attention for the platform against plain attention in float32; training
steps of the 455M model on one device: time, model FLOPs utilisation (MFU) and memory; tokens/s of
its decoding. Weights and tokens are random. `--small` does the same with a tiny model, on CPU too.
Exit codes: 0 all is as it should be, 1 numbers are wrong or something failed, 2 bad input.
"""

import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig, generate
from perceiver_ar_jax._version import __version__
from perceiver_ar_jax.command_line import Parser
from perceiver_ar_jax.lowering import fresh_state, lower_train_step
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.model.attention import Visibility
from perceiver_ar_jax.model.attention.dispatch import FUSED, IMPLEMENTATIONS
from perceiver_ar_jax.model.flops import training_flops
from perceiver_ar_jax.parallel import MeshConfig, make_mesh, use_mesh
from perceiver_ar_jax.parallel.chips import chip_of
from perceiver_ar_jax.run_config import DataSettings, RunConfig
from perceiver_ar_jax.self_check import KNOWN_MISCOMPILATIONS, LARGEST_DEVIATION, deviation
from perceiver_ar_jax.training import Batch

KERNELS = {"tpu": "pallas", "gpu": "cudnn"}
SMALL = PerceiverARConfig(
    vocab_size=64,
    max_seq_len=96,
    max_latents=32,
    num_channels=32,
    num_heads=2,
    num_self_attention_layers=2,
    dtype="bfloat16",
    remat="names",
)
BASE = PerceiverARConfig.clm_base(dtype="bfloat16", remat="names")


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--output", help="where to write the JSON")
    parser.add_argument("--small", action="store_true", help="a tiny model and short inputs")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        help="of attention (default: those for the platform)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="windows per step")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    arguments = parser.parse_args()
    if min(*arguments.batch, arguments.steps) < 1:
        parser.error("--batch and --steps are at least 1")
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {Path(arguments.output).absolute().parent}")
    config = SMALL if arguments.small else BASE
    kernel = KERNELS.get(jax.default_backend())
    names = arguments.implementations or [
        name for name in IMPLEMENTATIONS if name not in FUSED or name == kernel
    ]
    results = {"about": about(), "model": config.to_dict()}
    print(json.dumps(results["about"]))
    results["numerics"] = section(numerics, names, arguments.small)
    results["training"] = section(training, names, config, arguments.batch, arguments.steps)
    results["decoding"] = section(decoding, config, 8 if arguments.small else 128)
    results["wrong"] = wrong(results)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")
    print("wrong: " + ("; ".join(results["wrong"]) or "nothing"))
    return 1 if results["wrong"] else 0


def about() -> dict:
    """What the figures belong to."""
    device = jax.local_devices()[0]
    return {
        "perceiver_ar_jax": __version__,
        "jax": jax.__version__,
        "known_of_this_jax": KNOWN_MISCOMPILATIONS.get(jax.__version__),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "load": os.getloadavg()[0],
    }


def section(run, *arguments) -> list[dict]:
    """The figures as they come; a failure is one of them, so that the others reach us."""
    rows = []
    for make_row in run(*arguments):
        try:
            row = make_row()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            row = {**make_row.keywords, "error": f"{type(error).__name__}: {error}"[:2000]}
            if "config" in row:
                row["implementation"] = row.pop("config").attention
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def numerics(names, is_small):
    """Each implementation, dtype and part of attention."""
    for name in names:
        for dtype in ("float32", "bfloat16"):
            for part in ("prefix", "latents"):
                if name == "cudnn" and dtype == "float32" and jax.default_backend() == "gpu":
                    continue
                yield functools.partial(
                    distances, implementation=name, dtype=dtype, part=part, is_small=is_small
                )
        config = (SMALL if is_small else BASE).replace(attention=name)
        yield functools.partial(step_deviation, implementation=name, config=config)


def distances(*, implementation, dtype, part, is_small) -> dict:
    """How far results and gradients are from plain float32 ones, in norms."""
    num_latents, num_keys = (48, 80) if is_small else (512, 3500)
    shapes = (2, num_latents, 2, 128), (2, num_keys, 2, 128)
    pads_BK = jnp.arange(num_keys) < jnp.array([0, num_keys // 3])[:, None]
    visibility = Visibility(pads_BK)
    if part == "latents":
        shapes = shapes[0], shapes[0]
        ids_BL = jnp.arange(num_latents)[None].repeat(2, axis=0) // (num_latents // 3)
        # cuDNN does not separate documents.
        ids = (None, None) if implementation == "cudnn" else (ids_BL, ids_BL)
        visibility = Visibility(None, *ids, causal=True)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, dout = (
        jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
        for key, shape in zip(keys, (shapes[0], shapes[1], shapes[1], shapes[0]), strict=False)
    )
    q *= 128**-0.5
    dlse = jax.random.normal(keys[4], (2, 2, num_latents))

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, *inputs):
        attend = lambda *x: IMPLEMENTATIONS[name](*x, visibility, None)
        results, pull = jax.vjp(attend, *inputs)
        return *results, *pull((dout.astype(inputs[0].dtype), dlse))

    with jax.default_matmul_precision("highest"):
        expected = run("plain", *(x.astype(jnp.float32) for x in (q, k, v)))
    actual = run(implementation, q, k, v)
    row = {"implementation": implementation, "dtype": dtype, "part": part}
    for what, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        x, y = (np.asarray(array.astype(jnp.float32), np.float64) for array in (x, y))
        row[what] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
    return row


def step_deviation(*, implementation, config) -> dict:
    """That of a small training step."""
    return {"implementation": implementation, "part": "training step", "all": deviation(config)}


def training(names, config, batch_sizes, steps):
    """Each implementation and batch size, on one device."""
    for name in names:
        for batch_size in batch_sizes:
            yield functools.partial(
                timed_steps,
                config=config.replace(attention=name),
                batch_size=batch_size,
                steps=steps,
            )


def timed_steps(*, config, batch_size, steps) -> dict:
    """Time, MFU and memory of training steps; the first two are not timed."""
    run = RunConfig(model=config, batch_size=batch_size, data=DataSettings(source="none"))
    device = jax.local_devices()[0]
    mesh = make_mesh(MeshConfig(data=1), [device])
    start = time.perf_counter()
    compiled = lower_train_step(run, mesh).compile()
    compile_seconds = time.perf_counter() - start
    with use_mesh(mesh):
        state = jax.jit(functools.partial(fresh_state, run))()
    shape = batch_size, config.max_seq_len
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    batch = Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=1),
        pad_mask=jnp.zeros(shape, bool),
        weights=jnp.ones(shape, jnp.float32),
    )
    state, batch = jax.device_put((state, batch), compiled.input_shardings[0])
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    flops = batch_size * training_flops(config, config.max_prefix_len, config.max_latents)
    chip = chip_of(device.device_kind)
    memory = compiled.memory_analysis()
    return {
        "implementation": config.attention,
        "batch_size": batch_size,
        "seconds_per_step": median,
        "all_seconds": seconds,
        "tokens_per_second": batch_size * config.max_latents / median,
        "mfu": flops / median / chip.peak_flops if chip else None,
        "compile_seconds": compile_seconds,
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "peak_bytes_so_far": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "last_loss": loss,
    }


def decoding(config, num_new):
    """Prompts of half the window, a batch of one and of eight."""
    for batch_size in (1, 8):
        yield functools.partial(timed_decoding, config=config, batch_size=batch_size, new=num_new)


def timed_decoding(*, config, batch_size, new) -> dict:
    """Tokens per second of the loop alone: a run of `new` tokens less a run of one."""
    model = PerceiverAR(config.replace(remat="none"))
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    shape = batch_size, config.max_seq_len // 2
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, shape)

    def seconds(num_new):
        run = lambda: generate(model, params, prompt, num_latents=2, max_new_tokens=num_new)
        np.asarray(run())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            np.asarray(run())
            times.append(time.perf_counter() - start)
        return min(times)

    prefill, whole = seconds(1), seconds(new)
    return {
        "batch_size": batch_size,
        "prompt": shape[1],
        "new_tokens": new,
        "seconds_of_one_token": prefill,
        "tokens_per_second": batch_size * (new - 1) / max(whole - prefill, 1e-9),
    }


def wrong(results) -> list[str]:
    """What is further from plain float32 than rounding explains, or failed."""
    found = []
    for row in results["numerics"]:
        what = " ".join(str(row[key]) for key in ("implementation", "dtype", "part") if key in row)
        if "error" in row:
            found.append(f"{what}: {row['error'].splitlines()[0]}")
        for key in ("out", "lse", "dq", "dk", "dv", "all"):
            if key in row and not row[key] <= LARGEST_DEVIATION:
                found.append(f"{what}: {key} is {row[key]:.1%} away")
    for part in ("training", "decoding"):
        found += [
            f"{part}: {row['error'].splitlines()[0]}" for row in results[part] if "error" in row
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
