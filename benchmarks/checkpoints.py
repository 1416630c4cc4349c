"""What checkpoints cost: checksums per GB, and saving and restoring the state of a model.

python benchmarks/checkpoints.py [--rounds=3] [--bucket=gs://bucket/folder]

Prints JSON: medians of wall-clock seconds, their spread, and their ratio to a plain zlib.crc32 or a
plain write of as many bytes to the local disk in the same round. The state, 367 MB, is that of
bytes_small with AdamW. With --bucket, checkpoints go there; tools/storage_server.py imitates one.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import jax
import numpy as np
from processor import conditions
from timing import ratios, spread

from perceiver_ar_jax import PerceiverAR, PerceiverARConfig
from perceiver_ar_jax.model import init_params
from perceiver_ar_jax.training import OptimizerConfig, TrainState, make_optimizer
from perceiver_ar_jax.training.checkpoint import Checkpointer
from perceiver_ar_jax.training.checksums import checksums


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket", help="a folder in a bucket, for instance gs://bucket/folder")
    args = parser.parse_args()
    model = PerceiverAR(PerceiverARConfig.bytes_small())
    create = functools.partial(TrainState.create, tx=make_optimizer(OptimizerConfig()))
    state = jax.jit(lambda: create(params=init_params(model, jax.random.key(0))))()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    checksums(state)  # compiled
    seconds = {
        name: [] for name in ("checksums", "crc32", "save_blocks", "save", "restore", "write")
    }
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = f"{args.bucket}/{number}" if args.bucket else f"{folder}/checkpoints"
            measure(state, checkpoints, Path(folder), seconds)
    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    per_gb = {name: round(medians[name] / (num_bytes / 1e9), 3) for name in ("checksums", "crc32")}
    by_round = {
        f"{name} to {plain}": ratios(seconds[name], seconds[plain])
        for name, plain in (("checksums", "crc32"), ("save", "write"), ("restore", "write"))
    }
    result = {
        "bytes": num_bytes,
        "seconds": medians,
        "spread": {name: round(spread(times), 3) for name, times in seconds.items()},
        "seconds_per_gb": per_gb,
        "ratio": {name: round(statistics.median(x), 2) for name, x in by_round.items()},
    }
    print(json.dumps(conditions() | result, indent=2))


def measure(
    state: TrainState, checkpoints: str, folder: Path, seconds: dict[str, list[float]]
) -> None:
    """One round; adds its times."""

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        seconds[name].append(time.perf_counter() - start)
        return result

    leaves = [np.asarray(leaf).reshape(-1).view(np.uint8) for leaf in jax.tree.leaves(state)]
    timed("checksums", lambda: checksums(state))
    timed("crc32", lambda: [zlib.crc32(leaf) for leaf in leaves])
    checkpointer = Checkpointer(checkpoints)
    start = time.perf_counter()
    timed("save_blocks", lambda: checkpointer.save(state, {}))
    checkpointer.wait()
    seconds["save"].append(time.perf_counter() - start)
    timed("restore", lambda: jax.block_until_ready(checkpointer.restore(state)[0]))
    checkpointer.close()
    timed("write", lambda: plain_write(folder / "plain", leaves))


def plain_write(path: Path, leaves: list[np.ndarray]) -> None:
    """The same bytes to the same disk."""
    with path.open("wb") as file:
        for leaf in leaves:
            file.write(leaf)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
