"""How scripts start and end: quietly, and restarted with memory settings for the CPU."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from perceiver_ar_jax import command_line

ENVIRONMENT = {name: x for name, x in os.environ.items() if not name.startswith("MALLOC_")} | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
}


def script(body: str) -> list[str]:
    """A script whose `main` is the body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    start = "import json, os, sys, time\nfrom perceiver_ar_jax import command_line\n"
    end = "command_line.run_script('x.py', main)"
    return [sys.executable, "-c", f"{start}command_line.start_script()\ndef main():\n{lines}{end}"]


def run(command):
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
module, sys.argv = sys.argv[1], sys.argv[2:]
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("absl", ["train.py", "--config=configs/tiny.py"]),
        ("jax", ["train.py", "--config=configs/tiny.py"]),
        ("jax", ["evaluate.py", "--model=x", "--text=x"]),
        ("jax", ["convert_from_torch.py", "x", "--dry_run"]),
        ("jax", ["sample.py", "--model=x", "--prompt=x"]),
    ],
)
def test_ctrl_c_while_a_script_is_imported_is_silent(module, flags):
    done = run([sys.executable, "-c", INTERRUPTED_IMPORT, module, *flags])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_at_work_is_silent():
    process = subprocess.Popen(
        script("print('ready', flush=True)\ntime.sleep(600)"),
        env=ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (130, "")


def test_a_closed_pipe_ends_a_script_silently_with_141():
    for body in ("print('x' * 100_000, flush=True)", "print('x')"):
        process = subprocess.Popen(
            script(f"time.sleep(0.2)\n{body}"),
            env=ENVIRONMENT,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.close()  # as `| head` does once it has seen enough
        said = process.stderr.read()
        process.stderr.close()
        assert (process.wait(timeout=300), said) == (141, b"")


MEMORY = "print(json.dumps(dict(os.environ)))"


def test_a_script_starts_itself_once_with_memory_settings_for_the_cpu():
    environment = json.loads(run(script(MEMORY)).stdout)
    assert command_line.MALLOC_SETTINGS.items() <= environment.items()


@pytest.mark.parametrize(
    "given",
    [{"JAX_PLATFORMS": "tpu,cpu"}, command_line.MALLOC_SETTINGS | {"MALLOC_ARENA_MAX": "2"}],
)
def test_memory_settings_are_left_alone_with_an_accelerator_and_where_a_user_has_them(given):
    done = subprocess.run(
        script(MEMORY), env=ENVIRONMENT | given, cwd=ROOT, capture_output=True, text=True
    )
    environment = json.loads(done.stdout)
    found = {name: x for name, x in environment.items() if name.startswith("MALLOC_")}
    assert found == {name: x for name, x in given.items() if name.startswith("MALLOC_")}
    assert command_line.RESTARTED not in environment


def test_a_config_is_found_from_another_directory_and_help_shows_an_example(tmp_path):
    train = [sys.executable, str(ROOT / "train.py")]
    done = subprocess.run(
        [*train, "--config=configs/tiny.py", "--help_config"],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    batch_size = next(line for line in lines if line.startswith("--config.batch_size=8 "))
    assert batch_size.endswith("windows per step, over all devices")
    assert "--config.optimizer.total_steps=20" in lines
    said = run([*train, "--help"]).stdout
    assert "Example:\n  python train.py --config=configs/c4_base.py" in said
    assert "--help_config" in said and "default: runs/NAME" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file"),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "does not define get_config()"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line_also_with_overrides(tmp_path, text, words):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    flags = [f"--config={tmp_path / 'mine.py'}", "--config.steps=2", "--config.model.dtype=x"]
    done = run([sys.executable, "train.py", *flags])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"cannot read the config file {tmp_path / 'mine.py'}: " in done.stderr
    assert words in done.stderr
