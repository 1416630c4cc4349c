"""Continues prompts with a trained or converted model.

Examples:
  python sample.py --model=DIR --prompt="Once upon a time" --num_latents=2 --top_k=20
  python sample.py --model=DIR --prompt_file=prompts.txt --json     (a prompt a line)
  echo "Once upon a time" | python sample.py --model=DIR
"""

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> int:
    """Prints continuations on standard output, speeds on standard error; returns the exit code."""
    arguments = _parser().parse_args()
    from perceiver_ar_jax.command_line import exit_code  # here, so that --help costs nothing

    return exit_code("sample.py", lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="what load_pretrained reads")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", help="may be given several times")
    prompts.add_argument("--prompt_file", help="UTF-8 text, a prompt a line")
    parser.add_argument("--num_latents", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--greedy", action="store_true", help="the most likely token, no sampling")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--min_p", type=float)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--num_beams", type=int, default=1, help="above 1: beam search")
    parser.add_argument("--length_penalty", type=float, default=1.0, help="of beam search")
    parser.add_argument(
        "--penalty_alpha", type=float, help="contrastive search among top_k candidates"
    )
    parser.add_argument("--policy", default="slide", help="slide, recompute or reset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="an object a prompt, with log-probs")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import jax
    from absl import logging

    from perceiver_ar_jax import load_pretrained

    logging.set_verbosity(logging.WARNING)
    texts = _prompts(arguments)
    pretrained = load_pretrained(arguments.model)
    tokenizer = pretrained.tokenizer
    if tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer")
    prompts = [tokenizer.encode(text) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if not prompt:
            raise ValueError(f"the prompt {text!r} is empty")
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
        "policy": arguments.policy,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "vocab_size": tokenizer.vocab_size,
        "rng": jax.random.key(arguments.seed),
    }
    if len(prompts) == 1 and not arguments.json and arguments.num_beams == 1:
        _stream(pretrained, texts[0], prompts, options)
    else:
        _print_all(pretrained, texts, prompts, options, as_json=arguments.json)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt:
        return arguments.prompt
    if arguments.prompt_file:
        try:
            return Path(arguments.prompt_file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{arguments.prompt_file} is no UTF-8 text: {error}") from None
    return [sys.stdin.read().rstrip("\n")]


def _stream(pretrained, text, prompts, options) -> None:
    """Prints a single continuation as it comes."""
    from perceiver_ar_jax.generation import stream
    from perceiver_ar_jax.tokenizers import TextStream

    pieces = TextStream(pretrained.tokenizer)
    for token in prompts[0]:
        pieces.push(token)
    start = time.monotonic()
    times = []
    for (token,) in stream(pretrained.model, pretrained.params, prompts, **options):
        if not times:
            print(text, end="", flush=True)
        times.append(time.monotonic() - start)
        if token == options["eos_token_id"]:
            break
        print(pieces.push(int(token)), end="", flush=True)
    print(pieces.flush())
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    print(
        f"first token after {times[0]:.2f} s (compilation included), then {rate:.1f} tokens/s",
        file=sys.stderr,
    )


def _print_all(pretrained, texts, prompts, options, *, as_json: bool) -> None:
    """Prints all continuations, as text or as a JSON object a line."""
    from perceiver_ar_jax.generation import generate_with_log_probs

    start = time.monotonic()
    result = generate_with_log_probs(pretrained.model, pretrained.params, prompts, **options)
    seconds = time.monotonic() - start
    new = result.tokens[:, -options["max_new_tokens"] :].tolist()
    num_tokens = 0
    for text, prompt, row, log_probs in zip(texts, prompts, new, result.log_probs, strict=True):
        if options["eos_token_id"] in row:
            row = row[: row.index(options["eos_token_id"])]
        num_tokens += len(row)
        whole = pretrained.tokenizer.decode(prompt + row)
        if as_json:
            line = {"prompt": text, "text": whole, "tokens": row}
            print(json.dumps(line | {"log_probs": log_probs[: len(row)].tolist()}))
        else:
            print(whole)
    print(
        f"{num_tokens} tokens in {seconds:.2f} s (compilation included), "
        f"{num_tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
