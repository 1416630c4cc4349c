"""Worker processes are spawned from the main module, so every test runs its own script."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, json, multiprocessing, sys, time
from perceiver_ar_jax.data import DataConfig, make_loader
from perceiver_ar_jax.tokenizers import ByteTokenizer

def main(source, num_workers, state, count):
    config = DataConfig(source=source, min_seq_len=12, max_seq_len=24, batch_size=5, seed=3,
                        num_workers=int(num_workers), repeat=False)
    loader = make_loader(config, ByteTokenizer())
    if state != "none":
        loader.set_state(json.loads(state))
    digests = []
    for batch in loader:
        data = b"".join(batch[name].tobytes() for name in sorted(batch))
        digests.append(hashlib.sha256(data).hexdigest()[:8])
        if len(digests) == int(count):
            break
    children = [child.pid for child in multiprocessing.active_children()]
    print(json.dumps([digests, loader.get_state(), children]), flush=True)
    if count == "1":
        time.sleep(100)
    loader.close()
    assert not multiprocessing.active_children()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    texts = [f"{i}:" + "abcdefghij"[i % 10] * (7 * i % 90) for i in range(50)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))

    def start(num_workers, state="none", count=1000):
        arguments = [tmp_path / "run.py", tmp_path / "x.jsonl", num_workers, state, count]
        return subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )

    return start


def finished(process) -> list:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Exception ignored" not in errors
    return json.loads(output)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_the_stream_is_the_same_with_0_1_and_2_workers_and_for_fresh_processes(command):
    unbroken, _, _ = finished(command(0))
    head, state, children = finished(command(2, count=6))
    assert len(children) == 2
    tail, _, _ = finished(command(1, json.dumps(state)))
    assert len(unbroken) > 12
    assert head + tail == unbroken


def test_workers_exit_with_a_run_that_is_killed(command):
    process = command(2, count=1)
    _, _, children = json.loads(process.stdout.readline())
    assert all(map(is_running, children))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, children))


def test_an_error_in_a_worker_reaches_the_run_unchanged(command, tmp_path):
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write("\n")  # what was indexed is no longer what a worker finds
    script = tmp_path / "run.py"
    append = 'open(source, "a").write(json.dumps({"text": "late"}))\n    digests = []'
    script.write_text(SCRIPT.replace("digests = []", append))
    process = command(1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("ValueError: ")]
    assert "51 records, 50 were expected" in line
