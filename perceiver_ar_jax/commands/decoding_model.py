"""The model of a command that generates text: its flags, and how it is loaded."""

import argparse
from typing import TYPE_CHECKING

from perceiver_ar_jax.command_line import Parser

if TYPE_CHECKING:
    from perceiver_ar_jax.pretrained import Pretrained


def add_model_flags(parser: Parser) -> None:
    """Adds --model, --weights and --cache_dtype."""
    parser.add(
        "--model", "what load_pretrained reads: a workdir, a folder, a hub id", required=True
    )
    parser.add(
        "--weights",
        "float32, bfloat16 or int8: what the weights are converted to for decoding; int8 is the "
        "fastest (default: as the model is configured; on a CPU float32)",
    )
    parser.add(
        "--cache_dtype",
        "int8: keys and values of the text so far take a quarter of float32's memory, half of "
        "bfloat16's (default: what the model computes in)",
    )


def load_model(arguments: argparse.Namespace) -> "Pretrained":
    """The model that the flags name, with its tokenizer.

    Raises:
      ValueError: it is missing or damaged, or has no tokenizer.
    """
    import jax
    from absl import logging

    from perceiver_ar_jax.pretrained import load_pretrained

    logging.set_verbosity(logging.WARNING)
    weights = arguments.weights
    if weights is None and jax.default_backend() == "cpu":
        weights = "float32"  # a CPU takes longer in bfloat16 for a single prompt
    pretrained = load_pretrained(
        arguments.model, weights=weights, cache_dtype=arguments.cache_dtype
    )
    if pretrained.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer")
    return pretrained
