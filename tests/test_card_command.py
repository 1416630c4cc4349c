"""The command of the model's card, as typed, on documents of C4 where TFDS prepares them."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from hub_cache import write_hub_cache
from quick_compilation import xla_flags

pytest.importorskip("huggingface_hub", reason="needs the [hub] extra")
COMMAND = ["python", "train.py", "--config=configs/c4_base.py"]
NARROW = (
    "--config.batch_size=8",
    "--config.log_every=1",
    "--config.model.max_seq_len=32",
    "--config.model.max_latents=16",
    "--config.model.num_channels=16",
    "--config.model.num_heads=2",
    "--config.model.num_self_attention_layers=1",
    "--config.model.dtype=float32",
    "--config.data.min_seq_len=16",
    "--config.data.eval_split=validation",
    "--config.data.num_workers=0",
    "--config.sample.max_new_tokens=2",
)


@pytest.fixture(scope="module")
def machine(shared_data, tmp_path_factory) -> dict[str, str]:
    """The environment of a machine that has C4 and XLNet's tokenizer."""
    folder = tmp_path_factory.mktemp("machine")
    lines = next((shared_data / "c4").glob("*.jsonl")).read_text().splitlines()[:40]
    (folder / "some.jsonl").write_text("\n".join(lines))
    make = ["tools/make_c4_fixture.py", folder / "some.jsonl", "--output", folder, "--shards=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *make], cwd=ROOT, env=environment, check=True)
    cache = write_hub_cache(
        folder / "hub", "xlnet-base-cased", [shared_data / "xlnet" / "spiece.model"]
    )
    return environment | cache | {"TFDS_DATA_DIR": str(folder / "array_record")}


@pytest.mark.parametrize(("devices", "mesh"), [(1, "one device"), (8, "fsdp=8")])
def test_the_command_of_the_card_trains_and_typed_again_resumes(machine, tmp_path, devices, mesh):
    environment = machine | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
    }
    for name in ("train.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    said = []
    for steps in (2, 4):
        command = [sys.executable, *COMMAND[1:], *NARROW, f"--config.steps={steps}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout)
    assert f"mesh {mesh}" in said[0] and "c4/en:3.0.1" in said[0]
    assert "resumed from step 2 in" in said[1]
    workdir = tmp_path / "runs" / "c4_base"
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
