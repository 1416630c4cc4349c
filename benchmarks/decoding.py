"""Decoding speed against perceiver-io's generate(use_cache=True), in interleaved rounds.

    python benchmarks/decoding.py --model bytes_small --batch 1 --prompt 1024 --new 128

Prints one JSON object: tokens per second of the token loop alone, batch counted, the best round of
each; `ratio` is the median over rounds of reference time / our time. Needs requirements-parity.txt.
The weights are random. Time of the loop: a run of `new` tokens less a run of one. On one core
(taskset -c 1) it is CPU time, which other work on the machine hardly changes, otherwise wall time.
"""

import argparse
import json
import os
import statistics
import time
import warnings

import jax
import numpy as np

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig, generate
from perceiver_ar_jax.model import init_params

ONE_CORE = len(os.sched_getaffinity(0)) == 1
CLOCK = time.process_time if ONE_CORE else time.perf_counter

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
    parser.add_argument("--model", choices=MODELS, default="bytes_small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--num_latents", type=int, default=1)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", nargs="*", default=["slide"])
    parser.add_argument("--no_reference", action="store_true")
    args = parser.parse_args()

    config = MODELS[args.model]
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (args.batch, args.prompt))
    runs = {policy: ours(config, prompt, args.num_latents, policy) for policy in args.policy}
    if not args.no_reference:
        runs["perceiver-io"] = reference(config, prompt, args.num_latents)
    for run in runs.values():  # compile, warm up
        run(args.new), run(1)
    seconds = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run, args.new) - timed(run, 1))
    tokens = args.batch * (args.new - 1)
    result = vars(args) | {
        "load": os.getloadavg()[0],
        "clock": CLOCK.__name__,
        "tokens_per_sec": {name: round(tokens / min(times), 1) for name, times in seconds.items()},
    }
    if not args.no_reference:
        pairs = zip(seconds["perceiver-io"], seconds[args.policy[0]], strict=True)
        result["ratio"] = round(statistics.median(theirs / mine for theirs, mine in pairs), 2)
    print(json.dumps(result))


def timed(run, new_tokens):
    start = CLOCK()
    run(new_tokens)
    return CLOCK() - start


def ours(config, prompt, num_latents, policy):
    model = PerceiverAR(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))

    def run(new_tokens):
        generate(
            model,
            params,
            prompt,
            num_latents=num_latents,
            max_new_tokens=new_tokens,
            policy=policy,
        )

    return run


def reference(config, prompt, num_latents):
    warnings.simplefilter("ignore")
    import torch
    from perceiver.model.text import clm

    torch.set_num_threads(len(os.sched_getaffinity(0)))
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
                num_latents=num_latents,
                max_new_tokens=new_tokens,
                use_cache=True,
                do_sample=False,
                pad_token_id=0,
            )

    return run


if __name__ == "__main__":
    main()
