import os

from quick_compilation import xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", xla_flags(num_devices=8))

import hashlib
import json
from pathlib import Path

import hypothesis
import pytest

# PERCEIVER_AR_FUZZ=long tries 10,000 new examples a test in place of the same 200.
EASY_GOING = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("short", max_examples=200, derandomize=True, **EASY_GOING)
hypothesis.settings.register_profile("long", max_examples=10_000, **EASY_GOING)
hypothesis.settings.load_profile(os.environ.get("PERCEIVER_AR_FUZZ", "short"))

ROOT = Path(__file__).resolve().parent.parent
XLNET_SHA256 = "1f8c1c0bc2854d1af911a8550288c1258af5ba50277f3a5c829b98eb86fc5646"

WITHOUT_REFERENCE = (
    "compares with perceiver-io or its transformers, which need Python 3.11 "
    "(requirements-parity.txt says why)"
)


def import_reference(name: str):
    """A module of the packages that parity tests compare with; without it the test is skipped."""
    return pytest.importorskip(name, reason=WITHOUT_REFERENCE)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of text and tokenizers that tests read; see tools/make_test_data.py."""
    named = os.environ.get("PERCEIVER_AR_DATA")
    folders = [named] if named else [ROOT.parent / "shared" / "data", ROOT / "runs" / "test-data"]
    folder = next((Path(folder) for folder in folders if Path(folder).is_dir()), None)
    if folder is None:
        pytest.skip(f"no test data at {' or '.join(map(str, folders))}: `make test-data` makes it")
    return folder


@pytest.fixture(scope="session")
def c4_pages(shared_data) -> list[str]:
    """C4 pages as JSON lines; the last thirty are whole documents."""
    files = sorted((shared_data / "c4").glob("*.jsonl"))
    return [line for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def xlnet_model(shared_data) -> Path:
    """XLNet's own spiece.model, for tests that know its ids."""
    path = shared_data / "xlnet" / "spiece.model"
    if hashlib.sha256(path.read_bytes()).hexdigest() != XLNET_SHA256:
        pytest.skip(f"{path} is the stand-in that `make test-data` trains without the hub")
    return path


@pytest.fixture(scope="session")
def xlnet_golden(shared_data, xlnet_model) -> list[dict]:
    """Texts, ids and decoded texts that transformers recorded for XLNet's model."""
    path = shared_data / "xlnet" / "golden.json"
    if not path.is_file():
        pytest.skip("no golden.json here; the tests against transformers itself cover it")
    return json.loads(path.read_text())["cases"]
