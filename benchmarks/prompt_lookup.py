"""Speed of prompt lookup on texts that are given: what a model would gain that writes just them.

    taskset -c 1 python benchmarks/prompt_lookup.py --text code.py prose.txt
    taskset -c 1 python benchmarks/prompt_lookup.py … --model clm_base --tokenizer spiece.model

Weights are random; the token of the text is taken whatever the logits are. So the gain depends on
the text alone, and it is that of a model that predicts it well. Prints one JSON object per text:
`tokens_per_pass`, tokens per second of each contender, and `ratio`, the median over rounds of the
first contender's time to that of each. Batch 1; clock and times as in decoding.py.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import decoding
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.generation import prefill
from perceiver_ar_jax.generation.context import Context
from perceiver_ar_jax.generation.generation import Generation
from perceiver_ar_jax.generation.loop import Decoder, continue_until
from perceiver_ar_jax.generation.options import Options
from perceiver_ar_jax.generation.prompt_lookup import PromptLookup
from perceiver_ar_jax.generation.texts import Ending
from perceiver_ar_jax.generation.token_by_token import TokenByToken
from perceiver_ar_jax.model import init_params, prepare_for_decoding
from perceiver_ar_jax.model.cache import Cache, LayerCache
from perceiver_ar_jax.tokenizers import load_tokenizer


@struct.dataclass
class Given:
    """Takes the token of a text, in place of greedy choice."""

    text_T: jax.Array

    def __call__(self, logits_BV: jax.Array, count: jax.Array) -> jax.Array:
        """Token ids (1,)."""
        return self.text_T[count][None]


class Excerpt(NamedTuple):
    """Two parts of a text, as tokens."""

    prompt: np.ndarray
    continuation: np.ndarray

    def method(self, ahead: int) -> TokenByToken | PromptLookup:
        """What writes the continuation, guessing so many tokens."""
        token_by_token = TokenByToken(Given(jnp.array(self.continuation)))
        return PromptLookup(token_by_token, tokens_ahead=ahead) if ahead else token_by_token


@dataclasses.dataclass(frozen=True)
class GivenText(Options):
    """Options whose method is given."""

    given: TokenByToken | PromptLookup | None = None

    @property
    def method(self) -> TokenByToken | PromptLookup:
        """What appends tokens."""
        return self.given


def main() -> None:
    """Prints an object for each text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 files")
    parser.add_argument(
        "--quote", action="store_true", help="continue with the prompt, '> ' before each line"
    )
    parser.add_argument("--model", choices=decoding.MODELS, default="bytes_small")
    parser.add_argument("--tokenizer", default="bytes", help="what load_tokenizer reads")
    parser.add_argument("--weights", nargs="+", default=["raw", "int8"])
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 6])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = decoding.MODELS[args.model]
    tokenizer = load_tokenizer(args.tokenizer, vocab_size=config.vocab_size)
    params = jax.jit(init_params, static_argnums=0)(PerceiverAR(config), jax.random.key(0))
    for path in args.text:
        text = path.read_text()
        prompt, rest = np.split(tokenizer.encode(text), [args.prompt])
        if args.quote:
            lines = text.splitlines(keepends=True)
            rest = tokenizer.encode("".join("> " + line for line in lines))
        if len(rest) < args.new:
            parser.error(f"{path} has no {args.new} tokens after {args.prompt}")
        excerpt = Excerpt(prompt, np.array(rest[: args.new]))
        print(json.dumps(compared(excerpt, PerceiverAR(config), params, path, args)), flush=True)


def compared(excerpt, model, params, path, args):
    runs = {}
    for weights, ahead in itertools.product(args.weights, args.ahead):
        prepared = params if weights == "raw" else prepare_for_decoding(params, weights)
        name = f"{weights} lookup {ahead}" if ahead else weights
        runs[name] = run_of(excerpt, model, prepared, ahead)
    per_pass = {x: round((args.new - 1) / passes(excerpt, x), 2) for x in args.ahead}
    result = {**vars(args), "text": path.name, "tokens_per_pass": per_pass}
    return result | decoding.measured(runs, 1, args)


def run_of(excerpt, model, params, ahead):
    read = prefill(model, params, excerpt.prompt[None])
    options = GivenText(
        max_new_tokens=len(excerpt.continuation),
        prompt_lookup_num_tokens=ahead or None,
        given=excerpt.method(ahead),
    )

    def run(count):
        Generation(model, params, read, options).advance_to(count)

    return run


def passes(excerpt, ahead):
    """How often a model is asked for the continuation, but for the first token."""
    count_calls = lambda tokens, calls: (jnp.zeros((*tokens.shape, 1)), calls + 1)

    def read_ahead(tokens_RT, calls):
        hidden_RTD, calls = count_calls(tokens_RT, calls)
        return hidden_RTD, jnp.int32(tokens_RT.shape[1]), calls

    decoder = Decoder(
        step=count_calls,
        head=lambda hidden: hidden,
        read_ahead=read_ahead,
        keep=lambda tokens_RT, count, calls: calls,
    )
    no_pads = jnp.zeros(1, jnp.int32)
    cache = Cache.of_prompt(LayerCache(no_pads, no_pads), (), no_pads, 0)
    prompt_BS = jnp.array(excerpt.prompt[None])
    context = Context(prompt_BS, jnp.zeros((1, 1, 1)), cache)
    method, ending = excerpt.method(ahead), Ending(jnp.array([-1]), jnp.int32(0))
    new = len(excerpt.continuation)

    @jax.jit
    def calls():
        first = method.begin(decoder, context, jnp.int32(0), ending=ending, max_new_tokens=new)
        return continue_until(decoder, method, first, ending, jnp.int32(new)).state

    return int(calls())


if __name__ == "__main__":
    main()
