"""The script for TPU pods prints, when asked to, exactly the commands that it would run."""

import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/tpu_vm.sh"
TPU_VM = ["gcloud", "compute", "tpus", "tpu-vm"]
ON_ALL = [*TPU_VM, "ssh", "pod", "--worker=all"]
ZONE = "--zone=us-west4-a"


def tpu_vm(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True)


def commands(action: str, *arguments: str) -> list[list[str]]:
    done = tpu_vm("--dry_run", action, "pod", "us-west4-a", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v4-256", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_create_takes_the_image_of_the_chips_and_passes_flags_on(kind, image):
    made = [f"--accelerator-type={kind}", f"--version={image}", "--spot"]
    assert commands("create", kind, "--spot") == [[*TPU_VM, "create", "pod", *made, ZONE]]


def test_setup_brings_code_files_and_environment_to_all_hosts():
    archive, folder, copy, install = commands("setup", "spiece.model")
    path = archive[2].removeprefix("--output=")
    assert archive == ["git", "archive", f"--output={path}", "HEAD"]
    assert folder == [*ON_ALL, "--command=mkdir -p perceiver_ar_jax_run", ZONE]
    to = ["pod:perceiver_ar_jax_run", "--worker=all", ZONE]
    assert copy == [*TPU_VM, "scp", path, "spiece.model", *to]
    assert install == [
        *ON_ALL,
        "--command=cd perceiver_ar_jax_run && tar -xzf code.tar.gz && pip install --quiet uv && "
        "python3 -m uv venv --quiet --allow-existing --python=3.12 .venv && "
        "python3 -m uv pip install --quiet --editable '.[tpu]'",
        ZONE,
    ]
    assert not Path(path).parent.exists()


def test_run_starts_the_command_on_all_hosts_and_leaves_it_running():
    prompt = "--config.sample.prompt=It's a"
    (run,) = commands("run", "python", "train.py", prompt)
    assert run == [
        *ON_ALL,
        "--command=cd perceiver_ar_jax_run && . .venv/bin/activate && "
        r"{ nohup python train.py --config.sample.prompt=It\'s\ a > output.log 2>&1 "
        "< /dev/null & }",
        ZONE,
    ]


def test_tail_follows_the_first_host_and_delete_deletes():
    follow = "--command=tail -n 100 -F perceiver_ar_jax_run/output.log"
    assert commands("tail") == [[*TPU_VM, "ssh", "pod", "--worker=0", follow, ZONE]]
    assert commands("delete") == [[*TPU_VM, "delete", "pod", ZONE]]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["create", "pod"],
        ["create", "pod", "us-west4-a"],
        ["create", "pod", "us-west4-a", "v9-8"],
        ["run", "pod", "us-west4-a"],
        ["destroy", "pod", "us-west4-a"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments):
    done = tpu_vm("--dry_run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tpu_vm.sh: ") and done.stderr.count("\n") == 1
