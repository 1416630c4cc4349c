"""Continues prompts: `python sample.py --help`; or `perceiver-ar sample`."""

from perceiver_ar_jax.commands import run_command

if __name__ == "__main__":
    run_command("sample")
