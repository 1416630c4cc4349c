"""Runs of several processes: a narrow c4_base on documents of C4, prepared as TFDS does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import losses, metrics, train
from train_processes import ROOT, start_processes, wait

from perceiver_ar_jax import load_pretrained, train_loop
from perceiver_ar_jax.presets import preset

NARROW = {
    "steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 6,
    "checkpoint_every": 6,
    "model.max_seq_len": 64,
    "model.max_latents": 32,
    "model.num_channels": 16,
    "model.num_heads": 2,
    "model.num_self_attention_layers": 2,
    "model.dtype": "float32",
    "model.residual_dropout": 0.1,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "optimizer.warmup_steps": 2,
    "optimizer.learning_rate": 1e-2,
    "optimizer.total_steps": 6,
    "data.min_seq_len": 32,
    "data.eval_split": "validation",
    "data.num_workers": 0,
    "sample.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def flags(shared_data, c4_pages, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("c4")
    (folder / "some.jsonl").write_text("\n".join(c4_pages[:120]))
    # Half of it is for evaluation: more batches than may be in flight over several processes.
    command = ["tools/make_c4_fixture.py", folder / "some.jsonl", "--output", folder]
    command += ["--validation_every=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    settings = NARROW | {
        "data.source": folder / "array_record/c4/en/3.0.1",
        "data.tokenizer": shared_data / "xlnet/spiece.model",
    }
    given = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["--config=configs/c4_base.py", *given]


def config_of(flags: list[str], **changes):
    """The same settings for a run in this process."""
    config = preset("c4_base")
    for name, value in (flag[len("--config.") :].split("=", 1) for flag in flags[1:]):
        *sections, last = name.split(".")
        section = config
        for each in sections:
            section = section[each]
        section[last] = type(section[last])(value)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory) -> Path:
    """An uninterrupted run in this process, fsdp over all its devices."""
    workdir = tmp_path_factory.mktemp("straight")
    assert train(config_of(flags), workdir) == train_loop.DONE
    return workdir


def assert_same_losses(first, second):
    first, second = losses(first), losses(second)
    assert first.keys() == second.keys()
    np.testing.assert_allclose(
        [first[step] for step in first], [second[step] for step in first], rtol=1e-5
    )


def test_two_processes_of_four_devices_have_the_losses_of_one_of_eight(flags, straight, tmp_path):
    codes, _ = wait(start_processes(tmp_path, flags, processes=2, devices=4))
    assert codes == [0, 0]
    assert_same_losses(tmp_path, straight)
    evaluated = [line["eval/loss"] for line in metrics(tmp_path) if "eval/loss" in line]
    expected = [line["eval/loss"] for line in metrics(straight) if "eval/loss" in line]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-5)
    assert json.loads((tmp_path / "env.json").read_text())["processes"] == 2


def test_a_run_goes_on_on_other_numbers_of_devices_and_processes(flags, straight, tmp_path):
    """From 1 device to 2 processes of 2 devices to the 8 devices of this process."""
    for steps, processes, devices in ((2, 1, 1), (4, 2, 2)):
        until = [*flags, f"--config.steps={steps}"]
        codes, said = wait(start_processes(tmp_path, until, processes=processes, devices=devices))
        assert codes == [0] * processes, said
    assert train(config_of(flags), tmp_path) == train_loop.DONE
    assert_same_losses(tmp_path, straight)


def test_sigterm_to_one_of_two_ends_both_at_one_step_and_one_process_goes_on(
    flags, straight, tmp_path
):
    processes = start_processes(tmp_path, [*flags, "--config.steps=100000"], processes=2, devices=2)
    deadline = time.monotonic() + 400
    while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
        assert [process.poll() for process in processes] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    codes, _ = wait(processes)
    assert codes == [143, 143]
    saved = load_pretrained(tmp_path)  # knows nothing of the mesh
    assert saved.step == max(losses(tmp_path))
    steps = saved.step + 2
    assert train(config_of(flags, steps=steps), tmp_path) == train_loop.DONE
    assert load_pretrained(tmp_path).step == steps
    seen = losses(tmp_path)
    early = range(1, 1 + min(6, steps))
    np.testing.assert_allclose(
        [seen[step] for step in early], [losses(straight)[step] for step in early], rtol=1e-5
    )


def test_a_process_with_other_settings_is_named(flags, tmp_path):
    differing = "--config.optimizer.weight_decay=0.5"
    codes, said = wait(
        start_processes(tmp_path, flags, processes=2, devices=1, differing=differing)
    )
    assert codes == [2, 2]
    for text in said:
        assert "processes disagree: process" in text
        assert "has config" in text
        assert "Traceback" not in text


def test_a_process_that_nobody_joins_says_so(tmp_path):
    code = "from perceiver_ar_jax.parallel import join_processes; join_processes(seconds=2)"
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": "localhost:29771",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "waiting: 1 of 4 processes joined" in done.stderr
    assert "start the same command on every host" in done.stderr
