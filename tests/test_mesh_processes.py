"""Two processes of two devices each train and evaluate as one process does."""

import functools
import json

import numpy as np
import pytest
from sharded_training import CONFIG, evaluation_batches, mesh_of, train
from train_processes import outputs, start_joined

from perceiver_ar_jax import PerceiverAR
from perceiver_ar_jax.evaluation import evaluate
from perceiver_ar_jax.parallel import join_processes, to_global, use_mesh
from perceiver_ar_jax.training.checksums import checksums


def test_two_processes_train_and_evaluate_as_one_does_and_agree_on_checksums():
    axes = {"data": 2, "fsdp": 2}
    command = ["tests/multihost_training.py", json.dumps(axes | {"num_devices": 4})]
    processes = start_joined([command] * 2, devices=2)
    printed = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    first, second = (json.loads(text.splitlines()[-1]) for text, _ in printed)
    assert first == second
    mesh = mesh_of(num_devices=4, **axes)
    metrics, state = train(mesh)
    np.testing.assert_allclose(first["metrics"], metrics, rtol=1e-5)
    assert first["checksums"].keys() == checksums(state.params).keys()
    with use_mesh(mesh):
        evaluation = evaluate(
            state.params,
            evaluation_batches(),
            model=PerceiverAR(CONFIG),
            to_device=functools.partial(to_global, mesh=mesh),
        )
    np.testing.assert_allclose(first["evaluation"], evaluation.loss, rtol=1e-5)


def test_half_given_process_variables_are_refused():
    with pytest.raises(ValueError, match="not JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        join_processes({"JAX_COORDINATOR_ADDRESS": "host:1"})


def test_a_process_alone_joins_nobody():
    join_processes({})
