"""The settings of a run as a list, each with its value and the comment on its definition."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator

from ml_collections import ConfigDict

from perceiver_ar_jax.run_config import SECTIONS, RunConfig


def settings_help(config: ConfigDict) -> Iterator[str]:
    """A line for each setting of a config: the flag, its value, what it means."""
    values = config.to_dict()
    names = [field.name for field in dataclasses.fields(RunConfig)]
    yield from _lines("config.", RunConfig, {name: values[name] for name in names})


def _lines(prefix, section, values):
    comments = _comments(section)
    names = [field.name for field in dataclasses.fields(section)]
    for name in (name for name in names if name in values):
        if isinstance(values[name], dict):
            yield from _lines(f"{prefix}{name}.", SECTIONS[name], values[name])
        else:
            value = values[name] if values[name] != "" else "''"
            yield f"{f'--{prefix}{name}={value}':<50} {comments[name]}".rstrip()


def _comments(section):
    """By field, from the source of a dataclass: what follows the field on its last line."""
    source = textwrap.dedent(inspect.getsource(section))
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    return {
        node.target.id: lines[node.end_lineno - 1][node.end_col_offset :].lstrip(" #")
        for node in definition.body
        if isinstance(node, ast.AnnAssign)
    }
