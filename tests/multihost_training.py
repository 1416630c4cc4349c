"""One of several processes that train together: `python multihost_training.py`, JAX_… set."""

import functools
import json
import sys

import jax
from sharded_training import BATCH_SIZE, CONFIG, evaluation_batches, mesh_of, train

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.parallel import batch_share, join_processes, to_global, use_mesh
from perceiver_ar_jax.training.checksums import checksums


def main(axes: dict[str, int]) -> None:
    join_processes()
    mesh = mesh_of(**axes)
    index, count = batch_share(mesh)
    size = BATCH_SIZE // count
    rows = slice(index * size, (index + 1) * size)
    metrics, state = train(mesh, rows=rows)
    with use_mesh(mesh):
        evaluation = evaluate(
            state.params,
            evaluation_batches(index, count),
            model=PerceiverAR(CONFIG),
            to_device=functools.partial(to_global, mesh=mesh),
        )
    printed = {
        "metrics": metrics.tolist(),
        "checksums": checksums(state.params),
        "evaluation": evaluation.loss,
    }
    print(json.dumps(printed))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
