"""A workdir in a bucket: imitated storage, the real gcsfs, Orbax and TensorStore."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from small_runs import metrics, write_text

from perceiver_ar_jax import lease
from perceiver_ar_jax.data.storage import read_object, write_object

sys.path.append(str(ROOT / "tools"))

from storage_server import StorageServer

PATH = "gs://bucket/run/lease"


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    with StorageServer(tmp_path).running() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
        monkeypatch.setattr("perceiver_ar_jax.data.storage._file_systems", {})
        yield server


def test_a_run_lives_in_a_bucket_and_goes_on_from_there(server, tmp_path):
    environment = os.environ | {
        "TENSORSTORE_GCS_HTTP_URL": server.address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a gRPC service
    }
    flags = ["--config=configs/tiny.py", f"--config.data.source={write_text(tmp_path)}"]
    flags += ["--config.model.num_self_attention_layers=1", "--config.checkpoint_every=2"]
    for steps in (2, 4):
        command = [sys.executable, "train.py", "--workdir=gs://bucket/run", *flags]
        done = subprocess.run(
            [*command, f"--config.steps={steps}", "--config.optimizer.total_steps=4"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "resumed from step 2 in gs://bucket/run/checkpoints" in done.stdout
    workdir = tmp_path / "bucket/run"
    assert workdir / "lease" in server.generations  # it was there, and is released
    assert not (workdir / "lease").exists()
    assert {step.name for step in (workdir / "checkpoints").iterdir()} == {"2", "4"}
    assert [line["step"] for line in metrics(workdir) if "train/loss" in line] == [2, 4]
    assert len(list((workdir / "tensorboard").iterdir())) == 2  # one of each start
    assert not (ROOT / "gs:").exists()


def test_an_object_is_written_only_over_the_generation_that_is_named(server):
    assert read_object(PATH) is None
    first = write_object(PATH, b"a", generation=0)
    assert write_object(PATH, b"b", generation=0) is None
    second = write_object(PATH, b"c", generation=first)
    assert write_object(PATH, b"d", generation=first) is None
    assert read_object(PATH) == (b"c", second)
    assert write_object(PATH, None, generation=first) is None
    assert write_object(PATH, None, generation=second) == 0
    assert read_object(PATH) is None


def test_of_two_runs_in_one_bucket_workdir_the_second_is_refused(server):
    with lease.leased(PATH, seconds=1):
        refused = pytest.raises(
            ValueError, match=r"another run \(host .*\) is writing to it: gs://"
        )
        with refused, lease.leased(PATH, seconds=1):
            pass
        assert read_object(PATH) is not None
    assert read_object(PATH) is None


def test_the_lease_of_a_killed_run_ends(server):
    dead = write_object(PATH, b"{}", generation=0)
    with lease.leased(PATH, seconds=0.3):
        assert read_object(PATH)[1] > dead


def test_a_lease_whose_first_answer_was_lost_is_ones_own(server, monkeypatch):
    def write_and_lose(path, data, *, generation):
        write_object(path, data, generation=generation)
        monkeypatch.setattr(lease, "write_object", write_object)

    monkeypatch.setattr(lease, "write_object", write_and_lose)
    with lease.leased(PATH, seconds=1):
        pass
    assert read_object(PATH) is None


def test_a_run_whose_lease_was_taken_over_ends_with_one_line(server):
    code = f"""
import time
from perceiver_ar_jax.lease import leased
with leased({PATH!r}, seconds=1.2):
    print("holds", flush=True)
    time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, cwd=ROOT)
    assert run.stdout.readline() == "holds\n"
    while not write_object(PATH, b"another", generation=read_object(PATH)[1]):
        pass  # the holder was faster
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert errors == f"the lease {PATH}: another run has taken over; exit code 2\n"
