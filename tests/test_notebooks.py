"""The notebooks run from top to bottom, and what is committed shows what they print and draw."""

import importlib.util
import os

import pytest
from conftest import ROOT, WITHOUT_REFERENCE

NOTEBOOKS = ["sampling.ipynb", "convert.ipynb"]


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
