"""Trains a vocabulary: `python tools/train_tokenizer.py --help`; or `perceiver-ar tokenizer`."""

from perceiver_ar_jax.commands import run_command

if __name__ == "__main__":
    run_command("tokenizer")
