"""Trains a Perceiver AR: python train.py --config=configs/c4_base.py --workdir=DIR [--config.x=y].

The same command again resumes. Exit codes: 0 done, 2 bad input, 3 loss or gradient not finite,
4 no intact checkpoint, 143 preempted and saved.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    """Runs with the parsed flags; returns the exit code."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes
    if len(argv) > 1:
        return _fail(f"unexpected argument {argv[1]!r}", 2)
    from perceiver_ar_jax import train_loop  # here, so that --help and typing errors cost nothing
    from perceiver_ar_jax.training.checkpoint import CheckpointError

    try:
        return train_loop.run(CONFIG.value, WORKDIR.value)
    except ValueError as error:
        return _fail(error, 2)
    except CheckpointError as error:
        return _fail(error, 4)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(_fail(error, 2))


def _fail(error: object, code: int) -> int:
    print(f"train.py: {str(error).strip().splitlines()[0]}", file=sys.stderr)
    return code


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
