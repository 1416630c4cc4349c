"""Continues prompts with a trained or converted model.

Example:
  perceiver-ar sample --model=DIR --prompt="Once upon a time" --temperature=0.7 --top_k=20

Without --prompt or --prompt_file the prompt is standard input. One prompt is continued as the text
comes, several are one batch. Texts go to standard output, speeds to standard error.

Exit codes: 0 done, 2 bad input, 4 no intact checkpoint, 130 interrupted, 141 closed pipe.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from perceiver_ar_jax.command_line import Parser
from perceiver_ar_jax.commands.decoding_model import add_model_flags, load_model


def main(argv: list[str]) -> int:
    """Prints continuations on standard output, speeds on standard error; returns the exit code."""
    return _continue_prompts(_parser().parse_args(argv))


def _parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add
    add("--prompt", "may be given several times", action="append")
    add("--prompt_file", "UTF-8 text, one prompt per line; blank lines are skipped")
    add(
        "--num_latents",
        "how many of the prompt's last tokens are latents at the start. More make the first new "
        "tokens better (1, perceiver-io's default, costs them 0.1 nats after a long prompt), but "
        "each new token takes one, and once max_latents are in use --policy decides (default: all "
        "of the prompt, as far as that leaves 128 latents, or half of max_latents if that is less)",
        type=int,
    )
    add("--max_new_tokens", "how many tokens to add at most", type=int, default=64)
    add("--greedy", "the most likely token, no sampling", action="store_true")
    add("--temperature", "of sampling; below 1e-6 it is greedy", type=float, default=1.0)
    add("--top_k", "sample among this many likeliest tokens (default: all)", type=int)
    add("--top_p", "sample among the fewest tokens with this probability (default: 1)", type=float)
    add("--min_p", "drop tokens below this share of the likeliest (default: 0)", type=float)
    add("--repetition_penalty", "above 1: repeat less", type=float, default=1.0)
    add("--num_beams", "above 1: beam search", type=int, default=1)
    add("--length_penalty", "of beam search; above 0 favours long texts", type=float, default=1.0)
    add(
        "--penalty_alpha",
        "contrastive search among --top_k candidates, such as 0.6 (default: none)",
        type=float,
    )
    add(
        "--prompt_lookup_num_tokens",
        "guess so many tokens from the text so far, such as 6, and check them in one pass: the "
        "same text, faster where it repeats itself (default: none)",
        type=int,
    )
    add("--policy", "when latents are used up: slide, recompute or reset", default="slide")
    add("--seed", "of sampling", type=int, default=0)
    add("--json", "print one object per prompt, with log-probabilities", action="store_true")
    return parser


def _continue_prompts(arguments: argparse.Namespace) -> int:
    if arguments.prompt and arguments.prompt_file:
        raise ValueError("pass --prompt or --prompt_file, not both")
    import jax

    prompts = _prompts(arguments)
    pretrained = load_model(arguments)
    searches = arguments.num_beams > 1 or arguments.penalty_alpha is not None
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "num_latents": arguments.num_latents,
        "do_sample": not (arguments.greedy or searches),
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "num_beams": arguments.num_beams,
        "length_penalty": arguments.length_penalty,
        "penalty_alpha": arguments.penalty_alpha,
        "prompt_lookup_num_tokens": arguments.prompt_lookup_num_tokens,
        "policy": arguments.policy,
        "rng": jax.random.key(arguments.seed),
    }
    if len(prompts) == 1 and not arguments.json and arguments.num_beams == 1:
        _stream(pretrained, prompts[0], options)
    else:
        _print_all(pretrained, prompts, options, as_json=arguments.json)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt:
        return arguments.prompt
    if arguments.prompt_file is None:
        return [sys.stdin.read().rstrip("\n")]
    try:
        text = Path(arguments.prompt_file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{arguments.prompt_file} is not UTF-8 text: {error}") from None
    # Not splitlines(): form feeds and Unicode's line separators belong to a prompt.
    prompts = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{arguments.prompt_file} has no prompts: all its lines are blank")
    return prompts


def _stream(pretrained, prompt, options) -> None:
    """Prints a single continuation as it comes."""
    clock = _Clock()
    for count, piece in enumerate(pretrained.stream_text(prompt, **options)):
        if not count:
            clock.first_token()
            print(prompt, end="")
        print(piece, end="", flush=True)
    print()
    clock.report(num_later_tokens=count)


def _print_all(pretrained, prompts, options, *, as_json: bool) -> None:
    """Prints all continuations, as texts with a blank line between them or as JSON lines."""
    clock = _Clock()
    continuations = pretrained.continue_texts(prompts, on_first_token=clock.first_token, **options)
    num_tokens = sum(len(continuation.tokens) for continuation in continuations)
    clock.report(num_later_tokens=max(num_tokens - len(prompts), 0))
    for number, (prompt, (text, tokens, log_probs)) in enumerate(
        zip(prompts, continuations, strict=True)
    ):
        if as_json:
            line = {"prompt": prompt, "text": prompt + text}
            print(json.dumps(line | {"tokens": tokens, "log_probs": log_probs}))
        else:
            print("\n" * (number > 0) + prompt + text)


class _Clock:
    """Times the first token, which waits for compilation, apart from the others."""

    def __init__(self):
        import jax

        self._compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add_compilation)
        self._start = time.monotonic()

    def first_token(self) -> None:
        self._first = time.monotonic()
        self._compiling_first = self._compiling

    def report(self, *, num_later_tokens: int) -> None:
        seconds = time.monotonic() - self._first - (self._compiling - self._compiling_first)
        first = self._first - self._start
        line = f"first token after {first:.2f} s ({self._compiling_first:.2f} s compilation)"
        if num_later_tokens:
            line += f", then {num_later_tokens / seconds:.1f} tokens/s"
        print(line, file=sys.stderr)

    def _add_compilation(self, event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            self._compiling += seconds
