"""The pages for users: their Python runs, and the site is built from them without a warning."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from reference_tensors import write_hub_folder
from small_models import random_params

from perceiver_ar_jax import PerceiverARConfig
from perceiver_ar_jax.conversion import to_torch
from perceiver_ar_jax.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small byte model as perceiver-io saves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = PerceiverARConfig(
        max_seq_len=96, max_latents=32, num_channels=16, num_heads=2, num_self_attention_layers=1
    )
    tensors = to_torch(random_params(config), config)
    write_hub_folder(folder, config, dict(tensors))
    ByteTokenizer().save(folder)
    return folder


SHAPES_OF_PAGES = {
    "README.md": ("logits", (1, 256, 262)),
    "docs/coming_from_perceiver_io.md": ("logits", (1, 1, 262)),
    "docs/api.md": ("cross", (1, 2, 4, 12)),
}


@pytest.mark.parametrize("page", SHAPES_OF_PAGES)
def test_the_python_of_a_page_runs(page, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "model").symlink_to(checkpoint)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    assert blocks
    names = {"checkpoint": checkpoint}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    name, shape = SHAPES_OF_PAGES[page]
    assert names[name].shape == shape


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs the [docs] extra")
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index", "api", "_root/README", "_root/CONTRIBUTING"):
        assert (tmp_path / f"{page}.html").is_file(), page
    assert "prefix_len" in (tmp_path / "api.html").read_text()
