"""How well a model predicts a text: nats per token and bits per byte, as one JSON object.

Example:
  python evaluate.py --model=runs/tiny --text=README.md

Every token is predicted once, with at least max_seq_len - max_latents tokens before it as far as
there are. Attention stays inside a document if the model was trained so.

Exit codes: 0 done, 2 bad input, 4 no intact checkpoint, 130 interrupted.
"""

import argparse
import json

from perceiver_ar_jax.command_line import run_script, start_script


def main() -> int:
    """Prints the result; returns the exit code."""
    arguments = _parser().parse_args()
    return _run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name, help, **options):
        if "default" in options:
            help += " (default: %(default)s)"
        parser.add_argument(name, help=help, **options)

    add("--model", "what load_pretrained reads: a workdir, a folder, a hub id", required=True)
    add(
        "--text",
        "a file or glob of UTF-8 text or JSONL, or a TFDS name or directory",
        required=True,
    )
    add("--split", "a split of a TFDS dataset, or a slice such as train[:1%%]", default="train")
    add("--batch_size", "windows per step", type=int, default=8)
    return parser


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
            respect_documents=pretrained.respect_documents,
        ),
        pretrained.tokenizer,
        num_latents=config.max_latents,
    )
    result = evaluate(pretrained.params, batches, model=pretrained.model)
    line = {
        "model": arguments.model,
        "step": pretrained.step,
        "text": arguments.text,
        "respect_documents": pretrained.respect_documents,
        "nats_per_token": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    start_script()
    run_script("evaluate.py", main)
