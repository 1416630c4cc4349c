"""The files for SLURM and Kubernetes: what they do with exit codes, as far as can be seen here."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def sbatch(tmp_path):
    """Runs the batch script with an srun that starts two processes, as SLURM would."""
    # The job's processes end with the codes given; srun with the highest.
    srun = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
most=0
for code in $CODES; do
  CODE=$code "$@" || { status=$?; ((status < most)) || most=$status; }
done
exit $most
"""
    for name, text in (("srun", srun), ("scontrol", '#!/bin/sh\necho "scontrol $*"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(codes: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                "bash",
                SCRIPTS / "slurm.sbatch",
                "sh",
                "-c",
                "echo $JAX_LOCAL_DEVICE_IDS; exit $CODE",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "17",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_GPUS_ON_NODE": "4",
                "CODES": codes,
                **variables,
            },
        )

    return run


@pytest.mark.parametrize("codes", ["75 137", "143 143", "75 1"])
def test_slurm_starts_a_run_again_that_can_go_on(sbatch, codes):
    done = sbatch(codes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0,1,2,3", "0,1,2,3", "scontrol requeue 17"]


@pytest.mark.parametrize(("codes", "code"), [("0 0", 0), ("2 75", 2), ("3 3", 3), ("75 4", 4)])
def test_slurm_ends_with_a_code_that_a_restart_does_not_change(sbatch, codes, code):
    done = sbatch(codes)
    assert done.returncode == code
    assert "scontrol" not in done.stdout


def test_slurm_gives_up_in_the_end_and_leaves_one_gpu_to_each_of_many_processes(sbatch):
    done = sbatch("75 75", SLURM_RESTART_COUNT="100", SLURM_NTASKS_PER_NODE="4")
    assert done.returncode == 75
    assert done.stdout.split() == []


def test_slurm_options_are_known():
    text = (SCRIPTS / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert len(options) == text.count("#SBATCH")
    assert {"requeue", "signal", "time", "nodes", "ntasks-per-node", "gpus-per-node"} <= set(
        options
    )
    before_code, _, _ = text.partition("set -uo")
    assert before_code.count("#SBATCH") == len(options), "sbatch stops reading at the first command"


def test_jobset_restarts_all_hosts_except_after_codes_that_a_restart_does_not_change():
    spec = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (rule,) = spec["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = spec["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
