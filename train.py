"""Trains a Perceiver AR: python train.py --config=configs/c4_base.py --workdir=DIR [--config.x=y].

The same command again resumes. Exit codes: 0 done, 2 bad input, 3 loss or gradient not finite,
4 no intact checkpoint, 143 preempted and saved.
"""

import difflib
import runpy
import sys
from collections.abc import Iterator

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

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
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except CheckpointError as error:
        return _fail(error, 4)


def _parse(argv: list[str]) -> list[str]:
    try:
        argv = flags.FLAGS(argv)
        CONFIG.value  # noqa: B018  a file that does not load says so here
        return argv
    except AttributeError:
        sys.exit(_fail(_unknown_setting(argv), 2))
    except flags.Error as error:
        sys.exit(_fail(error, 2))
    except OSError:
        sys.exit(_fail(f"cannot read the config file {_config_file(argv)}", 2))


def _unknown_setting(argv: list[str]) -> str:
    """Which override names no setting of the config file, and the nearest one that it has."""
    file = _config_file(argv)
    known = list(_names(runpy.run_path(file)["get_config"](), "config"))
    for name in (x.lstrip("-").split("=")[0] for x in argv if x.startswith("--config.")):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            return f"{file} has no setting {name}; the nearest is {near}"
    return f"{file} does not load"


def _config_file(argv: list[str]) -> str:
    return next(x.split("=", 1)[1] for x in reversed(argv) if x.startswith("--config="))


def _names(config: ConfigDict, prefix: str) -> Iterator[str]:
    for name in config:
        yield f"{prefix}.{name}"
        if isinstance(config.get(name), ConfigDict):
            yield from _names(config[name], f"{prefix}.{name}")


def _fail(error: object, code: int) -> int:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(f"train.py: {' '.join(lines)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
