"""The notebooks run from top to bottom, and what is committed shows what they print and draw."""

import importlib.util
import os
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT, WITHOUT_REFERENCE

NOTEBOOKS = ["sampling.ipynb", "training.ipynb", "long_context.ipynb", "convert.ipynb"]


def read_notebook(name: str):
    nbformat = pytest.importorskip("nbformat", reason="notebooks need the [test] extra")
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_shows_its_outputs_and_no_errors(name):
    notebook = read_notebook(name)
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [output for cell in code_cells for output in cell.outputs]
    assert len(outputs) >= len(code_cells) // 2
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_these_are_all_notebooks():
    assert sorted(NOTEBOOKS) == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_installs_in_colab_and_nowhere_else(name, monkeypatch, capsys):
    """A stand-in of Colab: its module is there, our package is not, and pip only takes notes."""
    cell = next(cell for cell in read_notebook(name).cells if cell.cell_type == "code").source
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    exec(cell, {})
    assert (calls, capsys.readouterr().out) == ([], "")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(cell, {})
    assert calls == []  # installed already, as after the restart
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    address = "https://example.com/owner/name"
    exec(re.sub('^REPOSITORY = "[^"]*"', f'REPOSITORY = "{address}"', cell, flags=re.M), {})
    assert [command[-1] for command in calls] == [f"perceiver-ar-jax @ git+{address}"]
    assert "Restart session" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give the address of the repository"):
        exec(re.sub('^REPOSITORY = "[^"]*"', 'REPOSITORY = ""', cell, flags=re.M), {})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name):
    notebook = read_notebook(name)
    nbclient = pytest.importorskip("nbclient", reason="notebooks need the [test] extra")
    if name == "convert.ipynb" and not importlib.util.find_spec("perceiver"):
        pytest.skip(WITHOUT_REFERENCE)
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    nbclient.NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    ).execute(env=environment)  # raises what a cell raises
