"""The pages for users: their Python runs, and the site is built from them without a warning."""

import doctest
import importlib
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


RUNNING_PAGES = {  # and the shape of something that its last lines make
    "README.md": ("logits", (1, 256, 262)),
    "docs/api.md": ("cross", (1, 2, 4, 12)),
    "docs/coming_from_perceiver_io.md": ("logits", (1, 1, 262)),
    "docs/conversion.md": ("embedding", (262, 16)),
    "docs/decoding.md": ("tokens", (2, 3 + 32)),
}
# Their examples need C4, a server or lm-evaluation-harness, which tests of their own have.
OTHER_PAGES = {"docs/data.md", "docs/evaluation.md", "docs/serving.md"}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")])


@pytest.mark.parametrize("page", RUNNING_PAGES)
def test_the_python_of_a_page_runs(page, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "model").symlink_to(checkpoint)
    names = {"checkpoint": checkpoint, "path": checkpoint, "source": checkpoint, "folder": "ours"}
    for block in python_of(ROOT / page):
        exec(compile(block, page, "exec"), names)
    name, shape = RUNNING_PAGES[page]
    names |= names.get("params", {}).get("token_embedding", {})
    assert names[name].shape == shape


def python_of(page) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


def test_no_page_has_python_that_nothing_runs():
    with_python = {page.relative_to(ROOT).as_posix() for page in PAGES if python_of(page)}
    assert with_python == set(RUNNING_PAGES) | OTHER_PAGES


@pytest.mark.parametrize("module", ["config", "tokenizers.loading"])
def test_the_examples_of_docstrings_give_what_they_say(module):
    result = doctest.testmod(importlib.import_module(f"perceiver_ar_jax.{module}"))
    assert result.attempted and not result.failed


def test_docstrings_with_examples_are_among_those_that_run():
    files = (ROOT / "perceiver_ar_jax").rglob("*.py")
    found = {str(path.relative_to(ROOT)) for path in files if "\n    >>> " in path.read_text()}
    assert found == {"perceiver_ar_jax/config.py", "perceiver_ar_jax/tokenizers/loading.py"}


def anchors(page) -> set[str]:
    """What GitHub makes of the page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    names = [re.sub(r"[^\w\- ]", "", x).lower() for x in re.findall(r"^#+ (.*)$", text, re.M)]
    return {name.replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^) ]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_on_the_site():
    index = (ROOT / "docs" / "index.md").read_text().split("\n")
    pages = {page.stem for page in PAGES if page.parent == ROOT / "docs"} - {"index"}
    wanted = {"install", "quickstart", "gpu", "results", "reliability"}
    assert wanted <= pages <= set(index)
    assert {"Overview <_root/README>", "_root/CONTRIBUTING"} <= set(index)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs the [docs] extra")
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index", "api", "_root/README", "_root/CONTRIBUTING"):
        assert (tmp_path / f"{page}.html").is_file(), page
    assert "prefix_len" in (tmp_path / "api.html").read_text()
