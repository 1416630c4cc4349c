"""Converts a checkpoint of perceiver-io (PyTorch) to ours, or with --to_torch ours to perceiver-io.

    python convert_from_torch.py krasserm/perceiver-ar-clm-base --output clm_base
    python convert_from_torch.py clm_base --to_torch --output clm_base_torch

Exit codes: 0 done; 1 the result failed its verification and was not kept; 2 bad input; 4 no intact
checkpoint.
"""

import argparse
import contextlib
import ctypes
import json
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion import read_reference, to_flax, to_torch, write_reference
from perceiver_ar_jax.conversion.certificate import describe_model, versions
from perceiver_ar_jax.conversion.verification import (
    Inputs,
    compare,
    differing_tensors,
    our_logits,
    random_inputs,
    reference_logits,
)
from perceiver_ar_jax.conversion.writers import new_folder
from perceiver_ar_jax.pretrained import (
    CHECKPOINTS_FOLDER,
    TOKENIZER_FOLDER,
    load_pretrained,
    save_pretrained,
)
from perceiver_ar_jax.tokenizers import load_tokenizer
from perceiver_ar_jax.training.checkpoint import CheckpointError

CERTIFICATE = "conversion.json"  # in the output folder


class VerificationError(Exception):
    """The converted model is not the one it was made from."""


def main(argv: list[str] | None = None) -> int:
    """Converts what the arguments name; returns the exit code."""
    args = _parse(argv)
    _return_freed_memory()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _complain(f"warning: {message}")
        try:
            if args.to_torch:
                convert_to_torch(args)
            else:
                convert_from_torch(args)
        except (ValueError, OSError) as error:
            _complain(str(error).partition("\n")[0])
            return 2
        except VerificationError as error:
            _complain(f"{error}; nothing was written")
            return 1
        except CheckpointError as error:
            _complain(str(error))
            return 4
    return 0


def convert_from_torch(args: argparse.Namespace) -> None:
    """Reads a checkpoint of perceiver-io, writes ours."""
    seconds: dict[str, float] = {}
    source = read_reference(args.source)
    config = source.config.replace(param_dtype=args.dtype or source.config.param_dtype)
    tokenizer = _tokenizer_of(args, source.tokenizer_files, config)
    if args.dry_run:
        return _print(describe_model(source.tensors, config))
    with new_folder(args.output, overwrite=args.overwrite) as folder:
        checks: dict[str, Any] = {}
        if args.verify:  # the reference comes first, while no parameters are in memory here
            inputs = random_inputs(config, args.verify)
            with _timed(seconds, "reference"):
                expected = _reference_logits(source.tensors, config, inputs, checks)
        with _timed(seconds, "convert"):
            params = to_flax(source.tensors, config)
        with _timed(seconds, "write"):
            if tokenizer is not None:
                (folder / TOKENIZER_FOLDER).mkdir()
                tokenizer.save(folder / TOKENIZER_FOLDER)
            save_pretrained(folder, config, params)
        del params
        if args.verify:
            with _timed(seconds, "verify"):
                written = load_pretrained(folder)
                _check_bits(source.tensors, written.params, written.config, checks)
                if expected is not None:
                    ours = our_logits(written.params, written.config, inputs)
                    _check_logits(expected, ours, checks)
        _certify(args, folder, describe_model(source.tensors, config), checks, seconds)


def convert_to_torch(args: argparse.Namespace) -> None:
    """Reads a checkpoint of ours, writes perceiver-io's."""
    if not Path(args.source, CHECKPOINTS_FOLDER).is_dir():
        raise ValueError(f"{args.source} is no checkpoint of ours: no {CHECKPOINTS_FOLDER}/ in it")
    seconds: dict[str, float] = {}
    with _timed(seconds, "read"):
        source = load_pretrained(args.source)
    config = source.config.replace(param_dtype=args.dtype or source.config.param_dtype)
    params = jax.tree.map(lambda x: x.astype(config.param_dtype), source.params)
    tokenizer = _named_tokenizer(args, config) or source.tokenizer
    del source
    if args.dry_run:
        return _print(describe_model(to_torch(params, config), config))
    with new_folder(args.output, overwrite=args.overwrite) as folder:
        checks: dict[str, Any] = {}
        with _timed(seconds, "write"):
            write_reference(folder, params, config)
            if tokenizer is not None:
                tokenizer.save(folder)
        tensors = read_reference(folder).tensors
        if args.verify:
            inputs = random_inputs(config, args.verify)
            with _timed(seconds, "verify"):
                _check_bits(tensors, params, config, checks)
                ours = our_logits(params, config, inputs)
            del params  # the reference comes last, when they are in memory here no more
            with _timed(seconds, "reference"):
                expected = _reference_logits(tensors, config, inputs, checks)
            if expected is not None:
                _check_logits(expected, ours, checks)
        _certify(args, folder, describe_model(tensors, config), checks, seconds)


def _named_tokenizer(args: argparse.Namespace, config: PerceiverARConfig):
    if args.tokenizer is None:
        return None
    return load_tokenizer(args.tokenizer, vocab_size=config.vocab_size)


def _tokenizer_of(args: argparse.Namespace, files: tuple[Path, ...], config: PerceiverARConfig):
    """The tokenizer that is named, else the one beside the weights, if it is of a kind we read."""
    if args.tokenizer is not None or not files:
        return _named_tokenizer(args, config)
    try:
        return load_tokenizer(files[0].parent, vocab_size=config.vocab_size)
    except ValueError as error:
        warnings.warn(f"converting without its tokenizer: {error}", stacklevel=2)
        return None


def _reference_logits(
    tensors: Mapping[str, Any], config: PerceiverARConfig, inputs: Inputs, checks: dict[str, Any]
) -> np.ndarray | None:
    try:
        return reference_logits(tensors, config, inputs)
    except ImportError as error:
        checks["logits"] = f"not compared: {error}"
        return None


def _check_bits(tensors, params, config, checks: dict[str, Any]) -> None:
    differing = differing_tensors(tensors, params, config)
    if differing:
        raise VerificationError(f"tensors differ after a round trip: {', '.join(differing[:8])}")
    checks["round_trip"] = f"{len(tensors)} tensors come back bit for bit"


def _check_logits(expected, ours, checks: dict[str, Any]) -> None:
    comparison = compare(expected, ours)
    checks["logits"] = comparison._asdict()
    if not comparison.passed:
        raise VerificationError(f"logits differ from those of perceiver-io: {checks['logits']}")


def _certify(args, folder: Path, model, checks, seconds: dict[str, float]) -> None:
    """Stores the certificate beside the result, and prints it."""
    certificate = {
        "source": args.source,
        "direction": "to torch" if args.to_torch else "from torch",
        "model": model,
        "checks": checks,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "versions": versions(),
    }
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=1))
    _print(model)
    for name, value in (checks or {"checks": "none, as --verify none asks"}).items():
        print(f"{name:12}", value)
    print(f"{'seconds':12}", certificate["seconds"])
    print(f"{'written':12} {args.output}, with {CERTIFICATE}")


def _print(model: dict[str, Any]) -> None:
    print(f"{'parameters':12} {model['parameters']:,} in {len(model['tensors'])} tensors")
    print(f"{'bytes':12} {model['bytes']:,}")
    for name, value in model["inverse_frequencies"].items():
        print(f"{'frequencies':12} {name.replace('_', ' ')}: {value:.3g}")


def _return_freed_memory() -> None:
    """Makes glibc give large freed blocks back, which it would keep: a quarter of a large model."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _complain(message: str) -> None:
    print(f"convert_from_torch.py: {message}", file=sys.stderr)


def _rows(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number of rows or none, not {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Leaves out the usage: bad input gets one line."""
        _complain(f"{message} (--help explains)")
        self.exit(2)


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", metavar="SRC", help="Hugging Face directory, .safetensors, .bin or .ckpt file, "
        "or hub id; with --to_torch a checkpoint of ours")  # fmt: skip
    add("--output", required=True, type=Path, metavar="DIR", help="folder that is made")
    add("--to_torch", action="store_true", help="from ours to perceiver-io's")
    add("--tokenizer", metavar="FILE", help="spiece.model, tokenizer.json, a folder of either, or "
        "bytes; instead of the one beside the weights")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as stored")
    add("--verify", type=_rows, default=2, metavar="N|none", help="random rows to compare "
        "with perceiver-io, where it is installed (default 2); none: no checks")  # fmt: skip
    add("--dry_run", action="store_true", help="read and report, write nothing")
    add("--overwrite", action="store_true", help="replace what is in DIR")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
