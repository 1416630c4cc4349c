"""Decoding speed by policy and by kind of weights, in interleaved rounds.

    taskset -c 1 python benchmarks/decoding.py --model bytes_small --weights raw int8 --batch 1 4 8
    taskset -c 1 python benchmarks/decoding.py --reference --prompt 1024
    taskset -c 1 python benchmarks/decoding.py --model DIR --weights raw int8 --prompt_lookup 0 6

Prints one JSON object per batch size: tokens per second of the token loop alone, batch counted, the
best round of each, and `ratio`, the median over rounds of the first contender's time to that of
each, with its spread. With --reference the first is perceiver-io's generate(use_cache=True), which
needs requirements-parity.txt. `raw` are parameters that were not prepared for decoding. Weights are
random unless --model is a folder.
With --limit a contender named `weights once` only multiplies a vector by each float32 kernel per
token: what a token of batch 1 takes at least.
Time of the loop: a run of `new` tokens less a run of one. On one core (taskset -c 1) it is CPU
time, which other work on the machine hardly changes, otherwise wall time.
"""

import argparse
import itertools
import json
import statistics
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from processor import conditions
from timing import CLOCK, CORES, ratios, spread, timed

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig, generate, load_pretrained
from perceiver_ar_jax.model import init_params, prepare_for_decoding
from perceiver_ar_jax.model.decoding_params import WEIGHTS, DecodingKernel

MODELS = {
    "tiny": PerceiverARConfig(
        max_seq_len=1024,
        max_latents=256,
        num_channels=256,
        num_heads=4,
        num_self_attention_layers=4,
    ),
    "bytes_small": PerceiverARConfig.bytes_small(),
    "clm_base": PerceiverARConfig.clm_base(),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", default="bytes_small", help=f"{', '.join(MODELS)}, or what load_pretrained reads"
    )
    parser.add_argument("--text", default="Return a list of the names", help="of a trained model")
    parser.add_argument("--dtype", help="of the model's config", default="float32")
    parser.add_argument("--weights", nargs="+", choices=("raw", *WEIGHTS), default=["raw"])
    parser.add_argument("--policy", nargs="+", default=["slide"])
    parser.add_argument(
        "--prompt_lookup",
        type=int,
        nargs="+",
        default=[0],
        help="prompt_lookup_num_tokens; 0: none",
    )
    parser.add_argument("--sample", action="store_true", help="text that does not repeat itself")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--num_latents", type=int, default=1)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", action="store_true", help="compare with perceiver-io")
    parser.add_argument("--limit", action="store_true", help="compare with reading the weights")
    args = parser.parse_args()

    if args.reference and args.model not in MODELS:
        parser.error("--reference needs a model of random weights")
    for batch in args.batch:
        runs = {}
        if args.reference:
            config = MODELS[args.model]
            runs["perceiver-io"] = reference(config, random_prompt(config, batch, args), args)
        if args.limit:
            runs["weights once"] = weights_once(model_and_prompt("raw", batch, args)[1], batch)
        for weights in args.weights:
            model, params, prompt = model_and_prompt(weights, batch, args)
            for policy, ahead in itertools.product(args.policy, args.prompt_lookup):
                name = f"{weights} {policy}" + (f" lookup {ahead}" if ahead else "")
                options = {"policy": policy, "prompt_lookup_num_tokens": ahead or None}
                runs[name] = ours(model, params, prompt, args, options)
        print(json.dumps(vars(args) | {"batch": batch} | measured(runs, batch, args)), flush=True)


def measured(runs, batch, args):
    for run in runs.values():  # compile, warm up
        run(args.new), run(1)
    first, seconds = ({name: [] for name in runs} for _ in range(2))
    for _ in range(args.rounds):
        for name, run in runs.items():
            first[name].append(timed(run, 1))
            seconds[name].append(timed(run, args.new) - first[name][-1])
    tokens = batch * (args.new - 1)
    base = next(iter(runs))
    by_round = {name: ratios(seconds[base], times) for name, times in seconds.items()}
    return {
        **conditions(),
        "clock": CLOCK.__name__,
        "tokens_per_sec": {name: round(tokens / min(times), 1) for name, times in seconds.items()},
        "ratio": {name: round(statistics.median(x), 2) for name, x in by_round.items()},
        "ratio_spread": {name: round(spread(x), 3) for name, x in by_round.items()},
        "prefill_sec": {name: round(min(times), 3) for name, times in first.items()},
    }


def random_prompt(config, batch, args):
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, args.prompt))


def model_and_prompt(weights, batch, args):
    if args.model not in MODELS:
        pretrained = load_pretrained(args.model, weights=None if weights == "raw" else weights)
        row = pretrained.tokenizer.encode(args.text)
        return pretrained.model, pretrained.params, [row] * batch
    config = MODELS[args.model].replace(dtype=args.dtype)
    prompt = random_prompt(config, batch, args)
    params = jax.jit(init_params, static_argnums=0)(PerceiverAR(config), jax.random.key(0))
    if weights != "raw":
        params = prepare_for_decoding(params, weights)
        config = config.replace(dtype="bfloat16" if weights == "bfloat16" else "float32")
    return PerceiverAR(config), params, prompt


def ours(model, params, prompt, args, options):
    if (
        args.sample
    ):  # weights are random: drawn tokens are all but uniform, the likeliest ones repeat
        options |= {"do_sample": True, "rng": jax.random.key(0)}

    def run(new_tokens):
        generate(
            model,
            params,
            prompt,
            num_latents=args.num_latents,
            max_new_tokens=new_tokens,
            **options,
        )

    return run


def weights_once(params, batch):
    is_kernel = lambda x: isinstance(x, DecodingKernel)
    leaves = jax.tree.leaves(prepare_for_decoding(params), is_leaf=is_kernel)
    kernels = list(filter(is_kernel, leaves))

    @jax.jit
    def multiply(kernels):
        return [kernel(jnp.ones((batch, kernel.rows_FD.shape[1]))) for kernel in kernels]

    def run(num_tokens):
        for _ in range(num_tokens):
            jax.block_until_ready(multiply(kernels))

    return run


def reference(config, prompt, args):
    warnings.simplefilter("ignore")
    import torch
    from perceiver.model.text import clm

    torch.set_num_threads(CORES)
    names = clm.CausalLanguageModelConfig.__dataclass_fields__
    shared = {name: value for name, value in config.to_dict().items() if name in names}
    backend = clm.CausalLanguageModel(clm.CausalLanguageModelConfig(**shared)).eval()
    model = clm.PerceiverCausalLanguageModel(
        clm.PerceiverCausalLanguageModelConfig(backend.config), backend_model=backend
    )
    tokens = torch.tensor(prompt)
    mask = torch.ones_like(tokens)

    def run(new_tokens):
        with torch.inference_mode():
            model.generate(
                tokens,
                attention_mask=mask,
                num_latents=args.num_latents,
                max_new_tokens=new_tokens,
                use_cache=True,
                do_sample=False,
                pad_token_id=0,
            )

    return run


if __name__ == "__main__":
    main()
