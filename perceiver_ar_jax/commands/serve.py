"""Serves a trained or converted model on this machine: a page, and completions as OpenAI's API.

Example:
  perceiver-ar serve --model=DIR --port=8000

Prints the address of the page on standard output. docs/serving.md describes requests.

Exit codes: 2 bad input, 4 no intact checkpoint, 130 interrupted, 143 ended by SIGTERM.
"""

import argparse
from pathlib import Path

from perceiver_ar_jax.command_line import Parser
from perceiver_ar_jax.commands.decoding_model import add_model_flags, load_model


def main(argv: list[str]) -> int:
    """Serves until it is told to end; returns the exit code."""
    return _serve(_parser().parse_args(argv))


def _parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add
    add("--port", "of 127.0.0.1; 0 takes a free one", type=int, default=8000)
    add("--name", "of the model, for clients (default: the last part of --model)")
    add("--max_batch", "how many continuations run together", type=int, default=8)
    add("--max_queue", "how many continuations may wait", type=int, default=64)
    add("--max_tokens", "how many tokens a request may ask for", type=int, default=2048)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
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
    pretrained = load_model(arguments)
    name = arguments.name or Path(arguments.model).resolve().name
    serve(pretrained, name=name, port=arguments.port, limits=limits)
    return 0
