import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

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

WITHOUT_REFERENCE = (
    "compares with perceiver-io or its transformers, which need Python 3.11 "
    "(requirements-parity.txt says why)"
)


def import_reference(name: str):
    """A module of the packages that parity tests compare with; without it the test is skipped."""
    return pytest.importorskip(name, reason=WITHOUT_REFERENCE)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and tokenizers that tests read; set PERCEIVER_AR_DATA to move it."""
    folder = Path(os.environ.get("PERCEIVER_AR_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (PERCEIVER_AR_DATA names another folder)")
    return folder
