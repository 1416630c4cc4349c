"""How well a model predicts a text when it reads it token by token, by decoding policy; JSON.

    python benchmarks/policies.py --model DIR --text runs/quickstart/data/python_docs/en/2.0.0

Each row of the text begins with a prompt; the tokens after it are given to the policy one at a
time, as `generate` gives it the tokens it chose, and each is scored by what the caches predicted.
Prints nats per token in stretches of the row: latents left; latents used up, all tokens still in
the window of max_seq_len; and then half a window each. `above_recompute` are differences to
the exact policy on the same tokens, each with its standard error over the rows.
"""

import argparse
import functools
import itertools
import json

import jax
import numpy as np

from perceiver_ar_jax import load_pretrained
from perceiver_ar_jax.data.sources import open_source
from perceiver_ar_jax.evaluation.generation_quality import nats_of_new_tokens
from perceiver_ar_jax.generation.policies import POLICIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="what load_pretrained reads")
    parser.add_argument("--text", required=True, help="a file or glob of text, or a TFDS directory")
    parser.add_argument("--split", default="validation", help="of a TFDS directory")
    parser.add_argument("--prompt", type=int, default=192)
    parser.add_argument("--num_latents", type=int, default=64)
    parser.add_argument("--new", type=int, default=832)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    pretrained = load_pretrained(args.model)
    tokens_RS = read_rows(args, pretrained.tokenizer)
    nats = {}
    for name, policy in POLICIES.items():
        measure = jax.jit(
            functools.partial(
                nats_of_new_tokens,
                model=pretrained.model,
                policy=policy,
                prompt_len=args.prompt,
                num_latents=args.num_latents,
            )
        )
        batches = np.split(tokens_RS, range(args.batch, args.rows, args.batch))
        nats[name] = np.concatenate([measure(pretrained.params, batch) for batch in batches])
    stretches = stretches_of(args, pretrained.config)
    print(json.dumps(vars(args) | {"stretches": [report(nats, *ends) for ends in stretches]}))


def read_rows(args, tokenizer) -> np.ndarray:
    """The text's first rows of prompt and new tokens; documents are joined by eos."""
    source, length = open_source(args.text, args.split), args.prompt + args.new
    stream: list[int] = []
    for i in range(len(source)):
        stream += [*tokenizer.encode(source[i].text), tokenizer.eos_id]
        if len(stream) >= args.rows * length:
            return np.array(stream[: args.rows * length]).reshape(args.rows, length)
    raise SystemExit(f"{args.text} has {len(stream)} tokens, fewer than {args.rows} × {length}")


def stretches_of(args, config) -> list[tuple[int, int]]:
    """First and last new token of each stretch; what predicts token t has read the t - 1 before."""
    used_up = config.max_latents - args.num_latents + 1
    window_full = config.max_seq_len - args.prompt + 1
    ends = {used_up, *range(window_full, args.new, config.max_seq_len // 2), args.new}
    ends = sorted(min(end, args.new) for end in ends)
    return [(first + 1, last) for first, last in itertools.pairwise([0, *ends]) if first < last]


def report(nats: dict[str, np.ndarray], first: int, last: int) -> dict[str, object]:
    rows = {name: nats_RT[:, first - 1 : last].mean(axis=1) for name, nats_RT in nats.items()}
    differences = {name: x - rows["recompute"] for name, x in rows.items() if name != "recompute"}
    return {
        "new_tokens": [first, last],
        "nats_per_token": {name: round(float(x.mean()), 4) for name, x in rows.items()},
        "above_recompute": {name: mean_and_error(x) for name, x in differences.items()},
    }


def mean_and_error(x: np.ndarray) -> list[float]:
    return [round(float(x.mean()), 4), round(float(x.std(ddof=1) / len(x) ** 0.5), 4)]


if __name__ == "__main__":
    main()
