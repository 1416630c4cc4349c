"""Overrides on train.py's command line: accepted, or one line and exit code 2."""

import sys
from pathlib import Path

import pytest
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perceiver_ar_jax.commands import train
from perceiver_ar_jax.run_config import RunConfig, default_config

# ml_collections loads config files in a way that Python 3.12 drops; it has another one for that.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"


def names_of(config, prefix="config"):
    for name in config:
        yield f"{prefix}.{name}"
        if isinstance(config.get(name), type(config)):
            yield from names_of(config[name], f"{prefix}.{name}")


NAMES = st.sampled_from(sorted(names_of(default_config())))
PUNCTUATION = st.text(".[]'\"=0x", max_size=4)
WRONG_NAMES = st.builds(lambda *parts: "".join(parts), NAMES, PUNCTUATION, st.text(max_size=3))
NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
VALUES = st.text(max_size=12) | NUMBERS.map(str) | st.lists(st.integers()).map(str)
OVERRIDES = st.builds("--{}={}".format, NAMES | WRONG_NAMES, VALUES) | NAMES.map("--{}".format)


@pytest.fixture(autouse=True)
def flags_as_before():
    yield
    forget_overrides()


def forget_overrides():
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def check_overrides(overrides, monkeypatch, capsys):
    argv = ["train.py", f"--config={CONFIG}", "--workdir=run", *overrides]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections finds them
    forget_overrides()
    try:
        assert train._parse(argv) == ["train.py"]
    except SystemExit as exit:
        error = capsys.readouterr().err
        assert exit.code == 2
        assert error.startswith("train.py: ") and error.count("\n") == 1
        return
    try:
        RunConfig.from_config(train.CONFIG.value)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


@settings(suppress_health_check=[*HealthCheck])  # the fixtures are the same for every example
@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_overrides_are_accepted_or_answered_in_one_line(overrides, monkeypatch, capsys):
    check_overrides(overrides, monkeypatch, capsys)


@pytest.mark.parametrize(
    "override",
    [
        "--config.=3",
        "--config..steps=3",
        "--config.steps.x=3",
        "--config.sample.prompt.x=3",
        "--config.seed[0]=1",
        "--config.model.foo.bar=3",
        "--config.model=3",
        "--config.steps=1e3",
    ],
)
def test_malformed_overrides_are_answered_in_one_line(override, monkeypatch, capsys):
    check_overrides([override], monkeypatch, capsys)
