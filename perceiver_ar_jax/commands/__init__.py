"""The commands of `perceiver-ar`, each a module with `main(argv)`, and how they start.

train.py, sample.py and others at the top of a clone are the same commands.
"""

import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from perceiver_ar_jax.command_line import (
    BAD_INPUT,
    fail,
    keep_compiled_programs,
    keep_freed_memory,
    program,
    run_script,
    start_quietly,
)


class Command(NamedTuple):
    """A module of this package."""

    summary: str
    prepare: tuple[Callable[[], None], ...] = ()  # run before the module is imported


COMMANDS = {
    "train": Command("train a model, or resume its training", (keep_freed_memory,)),
    "sample": Command("continue prompts", (keep_freed_memory, keep_compiled_programs)),
    "evaluate": Command("measure a model on text, tasks or probes", (keep_freed_memory,)),
    "serve": Command(
        "show a page that streams text, and answer as OpenAI's API",
        (keep_freed_memory, keep_compiled_programs),
    ),
    "convert": Command("convert checkpoints from perceiver-io (PyTorch) and back"),
    "tokenizer": Command("train a SentencePiece vocabulary"),
}


def main() -> NoReturn:
    """`perceiver-ar COMMAND ...`; ends the process."""
    start_quietly()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        # Programs are named, in help and errors, by what was typed.
        sys.argv[:2] = [f"perceiver-ar {name}"]
        run_command(name)
    run_script("perceiver-ar", lambda: _without_command(name))


def run_command(name: str) -> NoReturn:
    """Runs a command with the arguments of `sys.argv`; ends the process with its exit code."""
    start_quietly()  # before the imports, which take a while
    for prepare in COMMANDS[name].prepare:
        prepare()

    def run() -> int:
        module = importlib.import_module(f"{__name__}.{name}")
        return module.main(sys.argv[1:])

    run_script(program(), run, _leave)


def _leave(code: int) -> NoReturn:
    processes = sys.modules.get("perceiver_ar_jax.parallel.processes")
    if processes is not None:  # of several processes, the others are told
        processes.end_process(code)
    sys.exit(code)


def _without_command(given: str) -> int:
    if given in ("--version", "-V"):
        from perceiver_ar_jax._version import __version__

        print(__version__)
        return 0
    if given not in ("--help", "-h", "help"):
        names = ", ".join(COMMANDS)
        return fail("perceiver-ar", f"there is no command {given!r}; there are {names}", BAD_INPUT)
    print("perceiver-ar COMMAND [FLAGS]      perceiver-ar COMMAND --help explains one\n")
    for name, command in COMMANDS.items():
        print(f"  {name:10} {command.summary}")
    return 0
