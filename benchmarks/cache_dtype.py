"""What int8 keys and values cost: loss and time of decoding a text that is given, as JSON.

    taskset -c 1 python benchmarks/cache_dtype.py --model=DIR --text=FILE

Each row of a batch reads `--prompt` tokens of the text at once and then `--new` more one at a time,
whose loss is taken; the rows follow one another in the text. `ratio` is the time of exact caches to
that of int8, the median over rounds. Clock and rounds as in decoding.py.
"""

import argparse
import functools
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from processor import conditions
from timing import CLOCK, ratios, timed

from perceiver_ar_jax import load_pretrained
from perceiver_ar_jax.pretrained import Pretrained


def main() -> None:
    """Prints one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="what load_pretrained reads")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file")
    parser.add_argument("--weights", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    seconds, nats = {}, {}
    runs = {name: run_of(name, args) for name in ("exact", "int8")}
    for name, run in runs.items():
        nats[name] = float(run())
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds.setdefault(name, []).append(timed(run))
    ratio = statistics.median(ratios(seconds["exact"], seconds["int8"]))
    result = {
        **{name: str(value) for name, value in vars(args).items()},
        **conditions(),
        "clock": CLOCK.__name__,
        "nats_per_token": {name: round(x, 5) for name, x in nats.items()},
        "loss_ratio": round(nats["int8"] / nats["exact"], 5),
        "ratio": round(ratio, 2),
    }
    print(json.dumps(result))


def run_of(cache: str, args: argparse.Namespace):
    """A function that decodes the text and returns its loss."""
    pretrained = load_pretrained(
        args.model, weights=args.weights, cache_dtype=None if cache == "exact" else cache
    )
    tokens_BS = rows_of(pretrained, args)
    cache_of_prompt = jax.jit(functools.partial(read, pretrained, args.prompt, args.new))
    ready = jax.block_until_ready(cache_of_prompt(pretrained.params, tokens_BS))
    decode = jax.jit(functools.partial(loss, pretrained))
    return lambda: jax.block_until_ready(
        decode(pretrained.params, ready, tokens_BS[:, args.prompt :])
    )


def rows_of(pretrained: Pretrained, args: argparse.Namespace) -> np.ndarray:
    """The end of the text, (B, S)."""
    length = args.prompt + args.new + 1
    ids = pretrained.tokenizer.encode(args.text.read_text()[-40 * args.batch * length :])
    if len(ids) < args.batch * length:
        raise SystemExit(f"{args.text} has {len(ids)} tokens of {args.batch * length} needed")
    return np.array(ids[-args.batch * length :]).reshape(args.batch, length)


def read(pretrained, prompt_len, new, params, tokens_BS):
    """The cache of the first tokens, with room for the rest."""
    latents = min(pretrained.config.max_latents - new, prompt_len)
    _, cache = pretrained.model.apply(
        {"params": params}, tokens_BS[:, :prompt_len], prompt_len - latents, method="prefill"
    )
    return cache.with_room(columns=prompt_len + new, latents=latents + new)


def loss(pretrained, params, cache, tokens_BT):
    """Of each token but the first, in nats."""
    variables = {"params": params}

    def step(cache, pair):
        token_B, next_B = pair
        hidden_BD, cache = pretrained.model.apply(variables, token_B, cache, method="decode_step")
        logits_BV = pretrained.model.apply(variables, hidden_BD, method="logits")
        log_probs_BV = jax.nn.log_softmax(logits_BV)
        return cache, -jnp.take_along_axis(log_probs_BV, next_B[:, None], axis=1).mean()

    pairs = jnp.asarray(tokens_BT[:, :-1]).T, jnp.asarray(tokens_BT[:, 1:]).T
    return jax.lax.scan(step, cache, pairs)[1].mean()


if __name__ == "__main__":
    main()
