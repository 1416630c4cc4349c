"""Trains a Perceiver AR: python train.py --config=configs/c4_base.py --workdir=DIR [--config.x=y].

The same command again resumes. Exit codes: 0 done, 2 bad input, 3 loss or gradient not finite,
4 no intact checkpoint, 143 preempted and saved.
"""

import difflib
import sys
from collections.abc import Iterator
from logging import getLogger

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    """Runs with the parsed flags; returns the exit code."""
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step it takes
    # What goes wrong while Orbax reads or writes is told in one line; asyncio would add dozens.
    getLogger("asyncio").setLevel("CRITICAL")
    if len(argv) > 1:
        return _fail(f"unexpected argument {argv[1]!r}")
    from perceiver_ar_jax import train_loop  # here, so that --help costs nothing
    from perceiver_ar_jax.command_line import exit_code

    return exit_code("train.py", lambda: train_loop.run(CONFIG.value, WORKDIR.value))


def _parse(argv: list[str]) -> list[str]:
    try:
        argv = flags.FLAGS(argv)
        CONFIG.value.seed  # noqa: B018  a file that did not load says so only when it is used
        return argv
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # by ml_collections
        sys.exit(_fail(_unknown_setting(argv) or error))
    except flags.Error as error:
        sys.exit(_fail(error))
    except OSError:
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        sys.exit(_fail(f"cannot read the config file {file}"))


def _unknown_setting(argv: list[str]) -> str | None:
    """Which override names no setting, and the nearest one that there is; None if all do."""
    from perceiver_ar_jax.run_config import default_config

    known = list(_names(default_config(), "config"))
    given = (x.lstrip("-").split("=")[0] for x in argv if x.startswith("--config."))
    unknown = next((name for name in given if name not in known), None)
    if unknown is None:
        return None
    nearest = difflib.get_close_matches(unknown, known, n=1, cutoff=0)[0]
    return f"there is no setting {unknown}; the nearest is {nearest}"


def _names(config: ConfigDict, prefix: str) -> Iterator[str]:
    for name in config:
        yield f"{prefix}.{name}"
        if isinstance(config.get(name), ConfigDict):
            yield from _names(config[name], f"{prefix}.{name}")


def _fail(error: object) -> int:
    from perceiver_ar_jax.command_line import BAD_INPUT, fail

    return fail("train.py", error, BAD_INPUT)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
