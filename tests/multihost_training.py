"""One of several processes that train together: `python multihost_training.py`, JAX_… set."""

import json
import sys

import jax
from sharded_training import BATCH_SIZE, mesh_of, train

from perceiver_ar_jax.parallel import batch_share, join_processes
from perceiver_ar_jax.training.checksums import checksums


def main(axes: dict[str, int]) -> None:
    join_processes()
    mesh = mesh_of(**axes)
    index, count = batch_share(mesh)
    rows = BATCH_SIZE // count
    metrics, state = train(mesh, rows=slice(index * rows, (index + 1) * rows))
    print(json.dumps({"metrics": metrics.tolist(), "checksums": checksums(state.params)}))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
