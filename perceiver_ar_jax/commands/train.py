"""Trains a Perceiver AR; the same command again resumes.

Example:
  perceiver-ar train --config=configs/c4_base.py --config.batch_size=1024

Flags:
  --config=FILE     a Python file with get_config(), or the name of a preset, as those in configs/;
                    required. FILE:ARGUMENT gives it an argument
  --config.x=VALUE  changes a setting
  --workdir=DIR     where the run lives; default: runs/NAME for configs/NAME.py, or
                    runs/NAME_ARGUMENT
  --help_config     lists the settings of --config (default: of no file) with their meaning
  --dry_run         checks everything, prints what would run and all settings, and stops
  --help            prints this

Exit codes: 0 done, 2 bad input, 3 loss or gradient not finite, 4 no intact checkpoint,
75 another host or the network is lost (the same command again goes on), 130 interrupted and saved,
143 preempted and saved.
"""

import difflib
import sys
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from perceiver_ar_jax.command_line import BAD_INPUT, as_typed, fail, program

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
CONFIG = config_flags.DEFINE_config_file("config", None, "File with get_config().")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Check, say what would run, and stop.")
HELP_CONFIG = flags.DEFINE_boolean("help_config", False, "List the settings.")


def main(argv: list[str]) -> int:
    """Runs with these flags, which `sys.argv` must hold too; returns the exit code."""
    if {"--help", "-h", "-help"} & set(argv):
        print(as_typed(__doc__.strip()))
        return 0
    _, *unexpected = _parse([program(), *argv])
    if unexpected:
        return _fail(f"unexpected argument {unexpected[0]!r}")
    if HELP_CONFIG.value:
        from perceiver_ar_jax.run_config import default_config
        from perceiver_ar_jax.settings_help import settings_help

        print(*settings_help(CONFIG.value or default_config()), sep="\n")
        return 0
    logging.set_verbosity(logging.WARNING)  # Orbax reports every step it takes
    # What goes wrong while Orbax reads or writes is said in one line; asyncio would add dozens.
    getLogger("asyncio").setLevel("CRITICAL")
    from perceiver_ar_jax import train_loop
    from perceiver_ar_jax.run_config import RunConfig

    file, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = Path(file).stem + (f"_{argument}" if argument else "")
    run = RunConfig.from_config(CONFIG.value)
    return train_loop.run(run, WORKDIR.value or f"runs/{name}", dry_run=DRY_RUN.value)


def _parse(argv: list[str]) -> list[str]:
    """Sets the flags; returns the program's name and what is not a flag."""
    try:
        argv = flags.FLAGS(_with_readable_config(argv))
        if not HELP_CONFIG.value and CONFIG.value is None:
            sys.exit(_fail("--config is required, such as --config=configs/c4_base.py"))
        return argv
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # by ml_collections
        sys.exit(_fail(_unknown_setting(argv) or error))
    except flags.Error as error:
        sys.exit(_fail(error))


def _with_readable_config(argv: list[str]) -> list[str]:
    """The arguments, --config with the path where its file was found; a bad file ends the run."""
    argv = list(argv)
    for place, argument in enumerate(argv):
        if argument in ("--config", "-config") and argv[place + 1 :]:
            argv[place + 1] = _readable(argv[place + 1])
        elif argument.startswith(("--config=", "-config=")):
            argv[place] = f"--config={_readable(argument.partition('=')[2])}"
    return argv


def _readable(given: str) -> str:
    """The path of a config file, which is tried out."""
    from perceiver_ar_jax.presets import find_config, read_config

    name, *argument = given.split(":", 1)
    try:
        found = find_config(name)
    except ValueError as error:
        sys.exit(_fail(error))
    except OSError as error:
        sys.exit(_fail(f"cannot read the config file {given}: {error}"))
    try:
        read_config(found, *argument)
    except Exception as error:  # whatever the file does
        reason = f"{type(error).__name__}: {error}"
        sys.exit(_fail(f"cannot read the config file {given}: {reason}"))
    return ":".join([str(found), *argument])


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
    return fail(program(), error, BAD_INPUT)
