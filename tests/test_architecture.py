"""The lines that keep the parts apart: who may import whom."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from perceiver_ar_jax import PerceiverARConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "perceiver_ar_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top of the house to the ground; a part imports parts of lower floors only, or itself.
FLOORS = (
    {"commands"},
    {"serving", "train_loop"},
    {"origin", "run_header", "samples", "settings_help"},
    {"lowering", "workdir"},
    {"command_line", "convert", "preemption", "presets", "run_config"},
    {"evaluation", "self_check"},
    {"lease", "pretrained"},
    {"publishing", "text_generation"},
    {"generation", "data", "training", "conversion"},
    {"model", "tokenizers"},
    {"config", "parallel", "processor", "_version"},
)
LIBRARIES = {  # third parties with one home each
    "torch": {"conversion"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "sentencepiece": {"tokenizers"},
    "array_record": {"data"},
    "lm_eval": {"evaluation/harness.py"},
    "orbax": {"training/checkpoint.py"},
    "ml_collections": {"run_config.py", "settings_help.py", "commands/train.py"},
    "fastapi": {"serving"},
    "pydantic": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
}
LAZY = ("torch", "tensorflow", "tensorflow_datasets", "transformers", "huggingface_hub", "wandb")


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Dotted names that a file imports; without `lazy` only what runs when it is imported."""
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor they reach"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part_of(path: Path) -> str:
    """`generation` for perceiver_ar_jax/generation/loop.py, `config` for its config.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(part: str) -> int:
    found = [i for i, floor in enumerate(FLOORS) if part in floor]
    assert found, f"{part} is a part on no floor"
    return found[0]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path != PACKAGE / "__init__.py"],  # it names things of every floor
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_point_down_and_floors_do_not_import_each_other(path):
    part = part_of(path)
    for name in imports(path):
        parents = name.split(".")
        if parents[0] != PACKAGE.name or len(parents) == 1:
            assert parents[0] not in ("train", "sample", "evaluate", "serve"), "scripts are on top"
            continue
        other = parents[1]
        assert other == part or floor_of(other) > floor_of(part), f"{part} imports {name}"


def test_scripts_are_entries_and_presets_import_settings_only():
    for path in set(ROOT.glob("*.py")) - {ROOT / "setup.py"}:
        assert imports(path) == {f"{PACKAGE.name}.commands", f"{PACKAGE.name}.commands.run_command"}
    for path in (ROOT / "configs").glob("*.py"):
        parts = {name.split(".")[1] for name in imports(path)}
        allowed = {"config", "presets", "pretrained", "processor", "run_config"}
        assert parts <= allowed, f"{path} imports {parts}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_has_one_home(library):
    homes = LIBRARIES[library]
    for path in FILES:
        if library not in {name.split(".")[0] for name in imports(path)}:
            continue
        inside = path.relative_to(PACKAGE).as_posix()
        assert inside in homes or part_of(path) in homes, f"{inside} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_only_when_a_function_needs_them(path):
    heavy = {name.split(".")[0] for name in imports(path, lazy=False)} & set(LAZY)
    assert not heavy, f"{path} imports {heavy} at module level"


def test_importing_the_package_loads_none_of_them():
    code = f"""
import sys
import perceiver_ar_jax
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({LAZY!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_lm_eval_is_imported_only_when_the_harness_is_asked_for():
    code = "import sys; import perceiver_ar_jax.evaluation; print('lm_eval' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_every_field_of_the_models_config_is_read_by_something():
    attributes = {
        node.attr
        for path in FILES
        if path.name not in ("config.py", "reference_config.py", "workdir.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    fields = {field.name for field in dataclasses.fields(PerceiverARConfig)}
    through_properties = {"num_self_attention_rotary_layers"}
    assert fields - through_properties - attributes == set()
