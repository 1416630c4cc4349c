"""Compiles decoding for a TPU that you do not have: memory, and the compiler's cycles per token.

    python tools/compile_decoding.py --topology=v5e:2x4 --max_seq_len=65536 --max_latents=1024

The 455M shape in bfloat16, `--batch` sequences per chip, greedy, the `slide` policy, caches as long
as the text may become. Other chips share nothing with it. Needs `pip install libtpu`.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from compiled_step import WITHOUT_A_TPU, compile_and_read, topology_devices
from xla_dump import Program

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.command_line import run_script
from perceiver_ar_jax.generation.context import read_prompt
from perceiver_ar_jax.generation.generation import begin, continue_to
from perceiver_ar_jax.generation.options import Options
from perceiver_ar_jax.model import init_params, prepare_for_decoding
from perceiver_ar_jax.model.decoding_params import WEIGHTS
from perceiver_ar_jax.parallel import MeshConfig, make_mesh, replicated, use_mesh
from perceiver_ar_jax.parallel.chips import chip_of

PROMPT_LEN = 64


def main() -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--max_seq_len", type=int, default=65_536)
    parser.add_argument("--max_latents", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1, help="sequences on a chip")
    parser.add_argument("--weights", choices=WEIGHTS, default="bfloat16")
    parser.add_argument("--cache_dtype", choices=("int8",), help="of caches (default: bfloat16)")
    args = parser.parse_args()
    os.environ |= WITHOUT_A_TPU
    device = topology_devices(args.topology)[0]
    chip = chip_of(device.device_kind)
    config = PerceiverARConfig.clm_base(
        max_seq_len=args.max_seq_len,
        max_latents=args.max_latents,
        dtype="bfloat16",
        cache_dtype=args.cache_dtype,
    )
    compiled, program = compile_step(config, device, weights=args.weights, batch=args.batch)
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    seconds = program.cycles_of_a_turn() / chip.clock_hz
    least = arguments / chip.memory_bandwidth
    free = 1 - (arguments + temporaries) / chip.memory_bytes
    print(
        f"one {chip.name}: weights and caches {arguments / 2**30:.2f} GiB, temporaries "
        f"{temporaries / 2**30:.2f} GiB, {free:.0%} free\n"
        f"a token of each of {args.batch} sequences: {seconds * 1e3:.2f} ms by the compiler's "
        f"cycles; reading weights and caches once takes {least * 1e3:.2f} ms\n"
        f"{args.max_seq_len:,} tokens of each: {args.max_seq_len * seconds:,.0f} s"
    )
    return 0


def compile_step(
    config: PerceiverARConfig, device, *, weights: str, batch: int
) -> tuple[jax.stages.Compiled, Program]:
    """The loop that appends tokens."""
    model, options = PerceiverAR(config), Options()
    mesh = make_mesh(MeshConfig(), [device])

    def on_device(tree):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))
        return jax.tree.map(place, tree)

    def decoding_params():
        return prepare_for_decoding(init_params(model, jax.random.key(0)), weights)

    with use_mesh(mesh):
        params = on_device(jax.eval_shape(decoding_params))
        prompt_BS = jax.ShapeDtypeStruct((batch, PROMPT_LEN), jnp.int32)
        pads_BS = jax.ShapeDtypeStruct((batch, PROMPT_LEN), bool)
        read = lambda *inputs: read_prompt(*inputs, prefix_len=PROMPT_LEN - 1, model=model)
        context, _ = jax.eval_shape(read, params, prompt_BS, pads_BS)
        static = {"model": model, "policy": options.decoding_policy}
        inputs = params, np.int32(config.vocab_size), options.method, options.ending
        start = lambda *inputs: begin(*inputs, max_new_tokens=config.max_seq_len, **static)
        progress = on_device(jax.eval_shape(start, *inputs, context))
        lowered = continue_to.lower(*inputs, progress, np.int32(config.max_seq_len), **static)
    return compile_and_read(lowered)


if __name__ == "__main__":
    run_script("compile_decoding.py", main)
