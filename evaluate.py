"""How well a model predicts a text: nats per token and bits per byte, as one JSON object.

Example:
  python evaluate.py --model=DIR --text=FILE
"""

import argparse
import json
import sys


def main() -> int:
    """Prints the result; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="what load_pretrained reads")
    parser.add_argument(
        "--text", required=True, help="a file or glob of UTF-8 text or JSONL, or a TFDS directory"
    )
    parser.add_argument("--split", default="train", help="of a TFDS directory, or a slice")
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    from perceiver_ar_jax.command_line import exit_code  # here, so that --help costs nothing

    return exit_code("evaluate.py", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from absl import logging

    from perceiver_ar_jax import load_pretrained
    from perceiver_ar_jax.data import DataConfig, evaluation_batches
    from perceiver_ar_jax.evaluation import evaluate

    logging.set_verbosity(logging.WARNING)
    pretrained = load_pretrained(arguments.model)
    config = pretrained.config
    if pretrained.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer")
    batches = evaluation_batches(
        DataConfig(
            source=arguments.text,
            split=arguments.split,
            min_seq_len=1,
            max_seq_len=config.max_seq_len,
            batch_size=arguments.batch_size,
        ),
        pretrained.tokenizer,
        num_latents=config.max_latents,
    )
    result = evaluate(
        pretrained.params,
        batches,
        model=pretrained.model,
        prefix_len=config.max_prefix_len,
        num_bytes=batches.num_bytes,
    )
    line = {
        "model": arguments.model,
        "step": pretrained.step,
        "text": arguments.text,
        "nats_per_token": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
