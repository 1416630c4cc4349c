"""Converts a checkpoint of perceiver-io (PyTorch) to ours, or with --to_torch ours to perceiver-io.

Examples:
  perceiver-ar convert krasserm/perceiver-ar-clm-base --output clm_base
  perceiver-ar convert clm_base --to_torch --output clm_base_torch
  perceiver-ar convert last.ckpt --dry_run        (reads and reports, writes nothing)

Exit codes: 0 done; 1 the result failed its verification and was not kept; 2 bad input; 4 no intact
checkpoint.
"""

import argparse
import contextlib
import ctypes
import sys
import warnings
from pathlib import Path
from typing import Any

from perceiver_ar_jax.command_line import Parser, clean_up_on_ctrl_c, exit_code, fail, program


def main(argv: list[str]) -> int:
    """Converts what the arguments name; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.output is None and not arguments.dry_run:
        _parser().error("--output is missing; only --dry_run does without")
    _return_freed_memory()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _complain(f"warning: {message}")
        return exit_code(program(), lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from perceiver_ar_jax import convert  # here, so that --help costs nothing
    from perceiver_ar_jax.conversion.verification import VerificationError

    clean_up_on_ctrl_c()  # an unfinished folder is removed
    options = {"dtype": arguments.dtype, "tokenizer": arguments.tokenizer}
    if arguments.dry_run:
        describe = convert.describe_ours if arguments.to_torch else convert.describe_torch
        _print_model(describe(arguments.source, **options))
        return 0
    options |= {"verify_rows": arguments.verify, "overwrite": arguments.overwrite}
    run = convert.convert_to_torch if arguments.to_torch else convert.convert_from_torch
    try:
        certificate = run(arguments.source, arguments.output, **options)
    except VerificationError as error:
        return fail(program(), f"{error}; nothing was written", error.exit_code)
    _print_model(certificate["model"])
    checks = certificate["checks"] or {"checks": "none, as --verify none asks"}
    for name, value in checks.items():
        print(f"{name:12}", value)
    print(f"{'seconds':12}", certificate["seconds"])
    print(f"{'written':12} {arguments.output}, with {convert.CERTIFICATE}")
    return 0


def _print_model(model: dict[str, Any]) -> None:
    print(f"{'parameters':12} {model['parameters']:,} in {len(model['tensors'])} tensors")
    print(f"{'bytes':12} {model['bytes']:,}")
    for name, value in model["inverse_frequencies"].items():
        print(f"{'frequencies':12} {name.replace('_', ' ')}: {value:.3g}")


def _return_freed_memory() -> None:
    """Makes glibc return large freed blocks; it would keep a quarter of a large model."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


def _complain(message: str) -> None:
    print(f"{program()}: {message}", file=sys.stderr)


def _rows(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows nor none")
    return int(text)


def _parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help="Hugging Face directory, .safetensors, .bin or .ckpt file, "
        "or hub id; with --to_torch a checkpoint of ours")  # fmt: skip
    add("--output", type=Path, metavar="DIR", help="the folder that is made (default: none, which "
        "only --dry_run allows)")  # fmt: skip
    add("--to_torch", action="store_true", help="from ours to perceiver-io's (default: from "
        "perceiver-io's to ours)")  # fmt: skip
    add("--tokenizer", metavar="NAME", help="spiece.model, tokenizer.json, a folder with one of "
        "them, a hub id, or bytes (default: the tokenizer next to the weights)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as stored)")
    add("--verify", type=_rows, default=2, metavar="N|none", help="compare the logits of N random "
        "rows with perceiver-io's, if it is installed; none: no checks (default: 2)")  # fmt: skip
    add("--dry_run", action="store_true", help="read and report, write nothing (default: off)")
    add("--overwrite", action="store_true", help="replace what is in DIR (default: off)")
    return parser
