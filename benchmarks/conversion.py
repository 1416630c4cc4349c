"""Memory and time of converting a random model of the 455M shape, both ways; prints JSON.

    python benchmarks/conversion.py [--verify N|none]

Writes three models of 1.8 GB to a temporary folder. Peaks are of the largest process, above those
of a Python that only imports the command; seconds are of all processes, on the CPU.
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

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.conversion import rules, to_flax, write_reference
from perceiver_ar_jax.model.positions import inverse_frequencies

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verify", default="2", metavar="N|none")
    verify = ["--verify", parser.parse_args().verify]
    with tempfile.TemporaryDirectory() as folder:
        source, ours, back = (Path(folder, name) for name in ("source", "ours", "back"))
        # A process of its own: what a process measures includes the memory of the one it came from.
        make = multiprocessing.get_context("spawn").Process(target=write_source, args=(source,))
        make.start()
        make.join()
        baseline = measure("-c", "import convert_from_torch")
        result = {
            "source_bytes": (source / "model.safetensors").stat().st_size,
            "verify": verify[1],
            "imports": baseline,
            "from_torch": measure("convert_from_torch.py", source, "--output", ours, *verify),
            "to_torch": measure(
                "convert_from_torch.py", ours, "--to_torch", "--output", back, *verify
            ),
            "comes_back_identical": filecmp.cmp(
                source / "model.safetensors", back / "model.safetensors", shallow=False
            ),
        }
    for direction in ("from_torch", "to_torch"):
        result[direction]["gb_above_imports"] = round(
            result[direction]["peak_gb"] - baseline["peak_gb"], 3
        )
    print(json.dumps(result, indent=2))


def write_source(folder: Path) -> None:
    """A Hugging Face directory of perceiver-io with random weights."""
    config = PerceiverARConfig.clm_base()
    config = config.replace(rotary_inv_freq=inverse_frequencies(config))
    rng = np.random.default_rng(0)
    tensors = {rules.FREQUENCIES: inverse_frequencies(config)}
    for rule in rules.rules(config):
        shape = rules.torch_shape(rule, config)
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
