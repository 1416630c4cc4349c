"""Serves a model on this machine: `python serve.py --help`; or `perceiver-ar serve`."""

from perceiver_ar_jax.commands import run_command

if __name__ == "__main__":
    run_command("serve")
