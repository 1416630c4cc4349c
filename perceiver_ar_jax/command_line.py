"""What the scripts share: how they start and end, and one line for what a user can mend.

Importing it costs nothing, so that scripts are quiet from their first moment on.
"""

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from perceiver_ar_jax.processor import computes_on_cpu, processor_id

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141

# First touches of fresh memory cost a fifth of a CPU training step; so glibc keeps what it has.
MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**46),  # more than the temporaries of any step
    "MALLOC_TOP_PAD_": str(2**28),
}
RESTARTED = "PERCEIVER_AR_RESTARTED"
# The scripts of commands whose names are not NAME.py.
SCRIPTS = {"convert": "convert_from_torch.py", "tokenizer": "tools/train_tokenizer.py"}


class Parser(argparse.ArgumentParser):
    """The parser of a script, whose --help begins with the script's docstring."""

    def __init__(self, description: str):
        super().__init__(
            prog=program(),
            description=as_typed(description),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add(self, name: str, help: str, **options: Any) -> None:
        """`add_argument`; the help names the default, if there is one."""
        if options.get("default") is not None:
            help += " (default: %(default)s)"
        self.add_argument(name, help=help, **options)

    def error(self, message: str) -> NoReturn:
        """Leaves out the usage: bad input gets one line."""
        self.exit(fail(self.prog, f"{message} (--help explains)", BAD_INPUT))


def program() -> str:
    """What runs: `train.py`, or `perceiver-ar train`."""
    return os.path.basename(sys.argv[0])


def as_typed(text: str) -> str:
    """The help of a command; `perceiver-ar train` is `python train.py` to who runs scripts."""
    if not program().endswith(".py"):
        return text
    script = lambda command: SCRIPTS.get(command[1], f"{command[1]}.py")
    return re.sub(r"perceiver-ar (\w+)", lambda command: f"python {script(command)}", text)


def start_script() -> None:
    """For the first line of a script: Ctrl-C is silent from now on, memory set for the CPU."""
    start_quietly()
    keep_freed_memory()


def start_quietly() -> None:
    """Ctrl-C from now on ends the process at once and silently: nothing is cleaned up."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def clean_up_on_ctrl_c() -> None:
    """Ctrl-C from now on raises KeyboardInterrupt, which `run_script` ends silently."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_script(
    name: str, main: Callable[[], int], leave: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """Ends the process with the exit code of `main`; Ctrl-C and closed pipes end it silently.

    `leave` is what ends it, given the exit code.
    """
    try:
        try:
            code = exit_code(name, main)
        except SystemExit as end:  # by argparse, after --help
            code = end.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = BROKEN_PIPE
    except Exception:  # a fault of ours
        traceback.print_exc()
        code = 1
    if code == BROKEN_PIPE:  # so that the interpreter has nothing left to complain about
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    leave(code)


def exit_code(name: str, run: Callable[[], int]) -> int:
    """What `run` returns; 2 after bad input, or the error's own exit code, each with one line."""
    try:
        return run()
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return fail(name, error, BAD_INPUT)
    except Exception as error:
        if code := getattr(error, "exit_code", None):
            return fail(name, error, code)
        raise


def fail(name: str, error: object, code: int) -> int:
    """Prints the error as one line; returns the code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(f"{name}: {' '.join(lines)}", file=sys.stderr)
    return code


def keep_freed_memory() -> None:
    """Starts the script again with glibc's malloc set for training and decoding on a CPU.

    Only before JAX is imported, once, and only where it helps: not with an accelerator, another
    C library, or settings of the user's own.
    """
    settings = {name: x for name, x in MALLOC_SETTINGS.items() if name not in os.environ}
    if os.environ.get(RESTARTED) or not settings or not _has_glibc() or not computes_on_cpu():
        return
    os.environ |= settings | {RESTARTED: "1"}
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache folder, so that the next start finds them.

    Only before JAX is imported, and not where the user says where to keep them. The folder is one
    per kind of processor, since programs for a CPU run on its kind only.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "perceiver_ar_jax" / f"compiled-{processor_id():08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: without a cache then
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _has_glibc():
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (ValueError, OSError):  # another C library does not know the name
        return False
