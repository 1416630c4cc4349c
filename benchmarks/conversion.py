"""Memory and time of converting a random model, the 455M shape by default, both ways; prints JSON.

    python benchmarks/conversion.py [--model bytes_small]

Writes three models of 1.8 GB each to a temporary folder, once without and once with verification
against perceiver-io. Peaks are of the largest process, and `gb_above_imports` is what it takes
above a Python that only imports what it imports; seconds are of all processes, on the CPU.
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from processor import conditions

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion import to_flax, write_reference
from perceiver_ar_jax.conversion.perceiver_io import (
    FREQUENCIES,
    PERCEIVER_IO,
)
from perceiver_ar_jax.conversion.rules import torch_shape
from perceiver_ar_jax.model.positions import inverse_frequencies

ROOT = Path(__file__).resolve().parent.parent
# What the largest process imports, by the value of --verify.
IMPORTS = {
    "none": "import perceiver_ar_jax.convert",
    "2": "import perceiver_ar_jax.convert, torch, perceiver.model.text.clm",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("clm_base", "bytes_small"), default="clm_base")
    parser.add_argument("--verify", nargs="+", choices=IMPORTS, default=list(IMPORTS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        # A process of its own: what a process measures includes the memory of the one it came from.
        spawn = multiprocessing.get_context("spawn").Process
        make = spawn(target=write_source, args=(source, args.model))
        make.start()
        make.join()
        size = (source / "model.safetensors").stat().st_size
        result = (
            conditions()
            | {"model": args.model, "source_bytes": size}
            | {f"verify {rows}": convert_both_ways(Path(folder), rows) for rows in args.verify}
        )
    print(json.dumps(result, indent=2))


def convert_both_ways(folder: Path, rows: str) -> dict[str, object]:
    source, ours, back = folder / "source", folder / "ours", folder / "back"
    options = ["--overwrite", "--verify", rows]
    imports = measure("-W", "ignore", "-c", IMPORTS[rows])
    result = {
        "imports": imports,
        "from_torch": measure("convert_from_torch.py", source, "--output", ours, *options),
        "to_torch": measure(
            "convert_from_torch.py", ours, "--to_torch", "--output", back, *options
        ),
    }
    for direction in ("from_torch", "to_torch"):
        above = result[direction]["peak_gb"] - imports["peak_gb"]
        result[direction]["gb_above_imports"] = round(above, 3)
    files = [path / "model.safetensors" for path in (source, back)]
    return result | {"comes_back_identical": filecmp.cmp(*files, shallow=False)}


def write_source(folder: Path, model: str) -> None:
    """A Hugging Face directory of perceiver-io with random weights."""
    config = getattr(PerceiverARConfig, model)()
    config = config.replace(rotary_inv_freq=inverse_frequencies(config))
    rng = np.random.default_rng(0)
    tensors = {FREQUENCIES: inverse_frequencies(config)}
    for rule in PERCEIVER_IO.of_model(config):
        shape = torch_shape(rule, config)
        tensors[rule.torch] = 0.02 * rng.standard_normal(shape, np.float32)
    write_reference(folder, to_flax(tensors, config), config)


def measure(*arguments) -> dict[str, float]:
    """Runs Python; peak memory of its largest process, and CPU seconds of all of them."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{arguments} ended with exit code {process.returncode}")
    return {
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


if __name__ == "__main__":
    main()
