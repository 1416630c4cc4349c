"""The script for TPU pods prints, when asked to, exactly the commands that it would run."""

import os
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
    command = r"python train.py --config.sample.prompt=It\'s\ a > output.log 2>&1"
    quoted = run[-2].partition("bash -c ")[2].partition(" > /dev/null 2>&1 < /dev/null & ")[0]
    assert shlex.split(quoted) == [f"{command}; echo $? > exit_code"]
    assert run == [
        *ON_ALL,
        "--command=cd perceiver_ar_jax_run && . .venv/bin/activate && rm -f exit_code && "
        "{ kill -KILL -- -$(cat group 2> /dev/null) 2> /dev/null || true; } && "
        f"{{ setsid nohup bash -c {quoted} > /dev/null 2>&1 < /dev/null & echo $! > group; }}",
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
        ["babysit", "pod", "us-west4-a", "v9-8", "--", "python", "train.py"],
        ["babysit", "pod", "us-west4-a", "v4-8", "python", "train.py"],
        ["--queue", "create", "pod", "us-west4-a", "v4-8"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments):
    done = tpu_vm("--dry_run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tpu_vm.sh: ") and done.stderr.count("\n") == 1


# Runs what `ssh` is given in a folder that stands for a host; takes the answers to `create` and
# `describe` from files, a line "STATUS TEXT" each, then succeeds.
GCLOUD = r"""#!/usr/bin/env bash
answer() {
  read -r status text < "$1" || { echo READY; return 0; }
  sed -i 1d "$1"
  echo "$text"
  return "$status"
}
name=$(sed -E 's/compute tpus (tpu-vm|queued-resources) ([a-z]+).*/\2/' <<< "$*")
case $* in
  *"pip install"*) name=install ;;
  *exit_code\ \|\|*) name=look ;;
  *setsid*) name=run ;;
esac
echo "$name" >> calls
case $name in
  create | describe) answer "$name" ;;
  delete) rm -r host/perceiver_ar_jax_run ;;
  install) mkdir -p host/perceiver_ar_jax_run/.venv/bin && touch "$_/activate" ;;
  scp) ;;
  *)
    for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
    cd host && bash -c "$command"
    ;;
esac
"""
MISSING = "1 NOT_FOUND: pod"
SET_UP = ["ssh", "scp", "install"]


@pytest.fixture
def babysit(tmp_path):
    """Babysits a job that ends in turn with each of the exit codes; returns also what was called.

    The job prints a step, a higher one each time.
    """

    def start(*options: str, codes: str, states: list[str], creates: list[str] = ()):
        for name, answers in (("describe", states), ("create", creates), ("calls", [])):
            (tmp_path / name).write_text("".join(f"{line}\n" for line in answers))
        for name, text in (("gcloud", GCLOUD), ("git", "#!/bin/sh\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "host").mkdir(exist_ok=True)
        (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
        job = f"cd {tmp_path}; read -r code < codes; sed -i 1d codes; echo tried >> tries"
        job += '; echo "step $(wc -l < tries)"; exit $code'
        command = ["v5litepod-256", "spiece.model", "--spot", "--", "bash", "-c", job]
        done = subprocess.run(
            ["bash", SCRIPT, *options, "babysit", "pod", "us-west4-a", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU_VM_PAUSE": "0"},
        )
        return done, (tmp_path / "calls").read_text().split()

    return start


def test_babysit_refused_then_preempted_then_restarts_until_the_run_is_done(babysit):
    done, calls = babysit(
        codes="75 0",
        states=[MISSING, MISSING, "0 CREATING", "0 PREEMPTED", MISSING],
        creates=["1 There is no more capacity in the zone", "0", "0"],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls[:4] == ["describe", "create", "describe", "create"]
    assert calls[4:9] == ["describe", "describe", "delete", "describe", "create"]
    assert calls[9:14] == ["describe", "look", *SET_UP]
    assert [call for call in calls[14:] if call != "look"] == ["run", "describe", "run"]
    assert "refused: There is no more capacity" in done.stdout
    assert "the run ended with exit code 75 at step 1" in done.stdout
    assert done.stdout.splitlines()[-2].endswith("the run is done")
    assert "the pod still costs" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("code", [2, 3, 4])
def test_babysit_stops_when_a_restart_mends_nothing_and_deletes_the_pod_if_told(babysit, code):
    done, calls = babysit("--queued", "--delete", codes=f"143 {code}", states=["0 ACTIVE"])
    assert done.returncode == code
    assert f"the run failed with exit code {code}" in done.stdout
    assert "step 2" in done.stdout
    assert calls[-1] == "delete"
    assert calls.count("run") == 2


def test_babysit_gives_up_after_failures_without_progress(babysit, tmp_path):
    (tmp_path / "tries").mkdir()  # so that the job prints no step
    done, calls = babysit(codes="1 " * 9, states=["0 READY"])
    assert done.returncode == 1
    assert calls.count("run") == 5
    assert "giving up after 5 failures in which the run got no further than step 0" in done.stdout


def test_babysit_gives_up_when_the_pod_is_refused_for_good(babysit):
    done, calls = babysit(codes="0", states=[MISSING] * 9, creates=["1 PERMISSION_DENIED"] * 9)
    assert done.returncode == 1
    assert calls == ["describe", "create"] * 5
    assert "refused: PERMISSION_DENIED" in done.stdout


def test_babysit_started_again_finds_the_run_and_does_not_start_another(babysit, tmp_path):
    folder = tmp_path / "host/perceiver_ar_jax_run"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    (folder / "output.log").write_text("step 7/20\n")
    start = "setsid sleep 1 > /dev/null 2>&1 & echo $! > group"  # an orphan, reaped when it ends
    subprocess.run(["bash", "-c", start], cwd=folder, check=True)
    done, calls = babysit(codes="0", states=["0 READY"])
    assert "the run is there" in done.stdout
    assert "vanished" in done.stdout  # it left no exit code, so the command is run again
    assert done.returncode == 0
    assert calls.count("run") == 1
