"""What the scripts share: one line for what a user can mend, and the exit code."""

import sys
from collections.abc import Callable

from perceiver_ar_jax.training.checkpoint import CheckpointError

BAD_INPUT, NO_CHECKPOINT = 2, 4


def exit_code(program: str, run: Callable[[], int]) -> int:
    """What `run` returns; 2 after bad input, 4 without an intact checkpoint, each with one line."""
    try:
        return run()
    except (ValueError, OSError) as error:
        return fail(program, error, BAD_INPUT)
    except CheckpointError as error:
        return fail(program, error, NO_CHECKPOINT)


def fail(program: str, error: object, code: int) -> int:
    """Prints the error as one line; returns the code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(f"{program}: {' '.join(lines)}", file=sys.stderr)
    return code
