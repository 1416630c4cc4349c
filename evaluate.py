"""Measures a model: `python evaluate.py --help`; or `perceiver-ar evaluate`."""

from perceiver_ar_jax.commands import run_command

if __name__ == "__main__":
    run_command("evaluate")
