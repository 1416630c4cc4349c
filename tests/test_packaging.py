"""The wheel and the sdist: what they hold, and that an installed wheel works alone."""

import configparser
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser

import pytest
from conftest import ROOT

from perceiver_ar_jax._version import __version__

PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both, built from what git would commit."""
    folder = tmp_path_factory.mktemp("build")
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT)
    if files.returncode:
        pytest.skip("not a git clone: what belongs to the source is not known")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():  # not one that is deleted
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"]
    done = run(*command, cwd=folder / "source")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_its_presets_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(x) for x in names if x.endswith(".dist-info/METADATA"))
    sources = [*ROOT.glob("perceiver_ar_jax/**/*.py"), *ROOT.glob("perceiver_ar_jax/**/*.html")]
    package = {path.relative_to(ROOT).as_posix() for path in sources}
    presets = {f"perceiver_ar_jax/configs/{name}" for name in PRESETS}
    found = {name for name in names if ".dist-info/" not in name}
    assert found == package | presets | {"perceiver_ar_jax/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    fields = Parser().parsestr(metadata.decode())
    assert fields["Version"] == __version__
    assert fields["Author"] == "the perceiver-ar-jax authors"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields["Project-URL"]


def test_the_sdist_holds_what_a_clone_does(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["train.py", "Makefile", "CHANGELOG.md", "CITATION.cff", "LICENSE", "docs/training.md"]
    wanted += ["tests/conftest.py", "tools/plot_run.py", "benchmarks/decoding.py"]
    assert not {*wanted, *(f"configs/{name}" for name in PRESETS)} - names


def test_the_readme_renders_on_pypi(built):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_repositorys_address_is_written_where_it_belongs(tmp_path, monkeypatch):
    """In a copy: the first address is replaced by the second, and README's links lead there."""
    nbformat = pytest.importorskip("nbformat", reason="needs the [test] extra")
    names = ["setup.cfg", "setup.py", "README.md", "CITATION.cff", "CONTRIBUTING.md"]
    names += ["perceiver_ar_jax/_version.py", "tools/set_repository.py"]
    names += [f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    refused = run(sys.executable, "tools/set_repository.py", "example.com/x", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("set_repository.py: 'example.com/x' is not the address of")
    for owner in ("first", "second"):
        address = f"https://github.com/{owner}/name"
        done = run(sys.executable, "tools/set_repository.py", address, cwd=tmp_path)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    texts = {name: (tmp_path / name).read_text() for name in names}
    assert not [name for name, text in texts.items() if "first/name" in text]
    assert texts["setup.cfg"].count("    Repository = https://github.com/second/name\n") == 1
    assert texts["CITATION.cff"].count("repository-code: https://github.com/second/name\n") == 1
    assert "    git clone https://github.com/second/name && cd" in texts["CONTRIBUTING.md"]
    for name in (name for name in names if name.endswith(".ipynb")):
        notebook = nbformat.reads(texts[name], as_version=4)
        title, install = notebook.cells[:2]
        link = f"https://colab.research.google.com/github/second/name/blob/main/{name}"
        assert title.source.count(f"colab-badge.svg)]({link})") == 1
        assert title.source.startswith("# ")
        assert '\nREPOSITORY = "https://github.com/second/name"  #' in install.source

    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(tmp_path / "setup.py"))
    links = re.findall(r"\]\(([^)#][^)]*)\)", given["long_description"])
    assert links and not [link for link in links if not link.startswith("https://")]
    pages = f"https://github.com/second/name/blob/v{__version__}"
    assert f"[LICENSE]({pages}/LICENSE)" in given["long_description"]
    assert "](https://github.com/second/name/raw/v" in given["long_description"]


def test_an_installed_wheel_runs_commands_and_finds_presets(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    done = run(*pip, "--no-compile", "--target", site, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    environment = {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    command = str(site / "bin" / "perceiver-ar")

    done = run(command, "--help", cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("train", "sample", "evaluate", "convert", "tokenizer"):
        assert re.search(rf"^  {name} +\w", done.stdout, re.MULTILINE)

    (tmp_path / "own.txt").write_text("The river runs, and often it sings.\n" * 100)
    flags = ["--config.data.source=own.txt", "--dry_run", "--config.data.num_workers=1"]
    done = run(command, "train", "--config=tiny", *flags, cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "own.txt" in done.stdout and "runs/tiny" in done.stdout
    done = run(command, "train", "--config=tny", cwd=tmp_path, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("perceiver-ar train: there is no preset 'tny'; there are bytes_")


def test_the_dockerfile_copies_what_there_is_and_installs_extras_that_there_are():
    """Docker itself is not run."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()]
    assert copied and not [name for name in copied if not (ROOT / name).exists()]
    extras = set(re.findall(r"ACCELERATOR=(\w+)", text))
    extras |= set(re.search(r"\[([\w,]+)\$", text)[1].split(","))
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {"tpu", "cuda12", "serve"} <= extras <= set(config["options.extras_require"])


def test_the_version_is_in_the_changelog_and_the_citation():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## (\d\S*?),? ", changelog, re.MULTILINE)[0]
    assert newest == __version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [__version__]
