"""Serves a trained or converted model on this machine: a page, and completions as OpenAI's API.

Example:
  perceiver-ar serve --model=DIR --port=8000

Prints the address of the page on standard output. docs/serving.md describes requests.

Exit codes: 2 bad input, 4 no intact checkpoint, 130 interrupted, 143 ended by SIGTERM.
"""

import argparse
from pathlib import Path

from perceiver_ar_jax.command_line import Parser


def main(argv: list[str]) -> int:
    """Serves until it is told to end; returns the exit code."""
    return _serve(_parser().parse_args(argv))


def _parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add
    add("--model", "what load_pretrained reads: a workdir, a folder, a hub id", required=True)
    add("--port", "of 127.0.0.1; 0 takes a free one", type=int, default=8000)
    add(
        "--weights",
        "float32, bfloat16 or int8: what the weights are converted to for decoding; int8 is the "
        "fastest (default: as the model is configured; on a CPU float32)",
    )
    add("--name", "of the model, for clients (default: the last part of --model)")
    add("--max_batch", "how many continuations run together", type=int, default=8)
    add("--max_queue", "how many continuations may wait", type=int, default=64)
    add("--max_tokens", "how many tokens a request may ask for", type=int, default=2048)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    import jax
    from absl import logging

    from perceiver_ar_jax.pretrained import load_pretrained

    try:
        from perceiver_ar_jax.serving import Limits, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'perceiver-ar-jax[serve]'") from None
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port must be between 0 and 65535, not {arguments.port}")
    limits = Limits(
        max_batch=arguments.max_batch,
        max_queue=arguments.max_queue,
        max_tokens=arguments.max_tokens,
    )
    logging.set_verbosity(logging.WARNING)
    weights = arguments.weights
    if weights is None and jax.default_backend() == "cpu":
        weights = "float32"  # a CPU takes longer in bfloat16 for a single prompt
    pretrained = load_pretrained(arguments.model, weights=weights)
    if pretrained.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer")
    name = arguments.name or Path(arguments.model).resolve().name
    serve(pretrained, name=name, port=arguments.port, limits=limits)
    return 0
