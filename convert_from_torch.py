"""Converts checkpoints: `python convert_from_torch.py --help`; or `perceiver-ar convert`."""

from perceiver_ar_jax.commands import run_command

if __name__ == "__main__":
    run_command("convert")
