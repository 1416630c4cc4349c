"""Trains a Perceiver AR: `python train.py --help`; or `perceiver-ar train`."""

from perceiver_ar_jax.commands import run_command

if __name__ == "__main__":
    run_command("train")
