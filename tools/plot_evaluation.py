"""Draws the tables of an evaluation, as evaluate.py --output writes them, as SVG.

    python tools/plot_evaluation.py RESULT.json … [--output=evaluation.svg]

One panel for each table that the files have: the loss by place in the document and by how much the
model read, or what a probe found.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from svg_chart import Box, Label, Panel
from svg_drawing import BLUE, GREEN, ORANGE, Drawing

WIDTH, ROW_HEIGHT, TOP, PLOT_HEIGHT = 900, 330, 66, 210
SPANS = (58, 436), (506, 884)


class Plot(NamedTuple):
    """How a table is drawn: `curves` name its columns; `x` is a column, or None for ranges."""

    title: str
    x_name: str
    curves: dict[str, str]
    x: str | None = None
    log: bool = False


PLOTS = {
    "by_position": Plot(
        "Nats per token, by position", "tokens of the document before it",
        {"nats_per_token": "nats"}, log=True,
    ),
    "by_context": Plot(
        "Nats per token, by context", "tokens that the model read", {"nats_per_token": "nats"}
    ),
    "by_prefix": Plot(
        "Nats per token, by prefix", "tokens of it that were prefix", {"nats_per_token": "nats"}
    ),
    "prefix": Plot(
        "Nats per token, by length of the prefix", "tokens of prefix",
        {"nats_per_token": "nats"}, x="prefix",
    ),
    "passkey": Plot(
        "Nats per token of a pass key", "tokens between the key and the question",
        {"nats_per_token": "said", "other_key_nats_per_token": "another was said"},
        x="distance", log=True,
    ),
    "repetition": Plot(
        "Nats per random token", "random tokens before they repeat",
        {"first_nats_per_token": "first time", "second_nats_per_token": "second time"},
        x="length", log=True,
    ),
}  # fmt: skip


def draw(result: dict[str, Any], title: str) -> Drawing:
    """The page with a panel for each table.

    Raises:
      ValueError: there is no table that can be drawn.
    """
    names = [name for name in PLOTS if result.get(name)]
    if not names:
        raise ValueError(f"no table among {', '.join(PLOTS)}: evaluate.py --output writes them")
    height = ROW_HEIGHT * -(-len(names) // 2) + 10
    drawing = Drawing(WIDTH, height, title=title, description="What a model knows.")
    for place, name in enumerate(names):
        row, column = divmod(place, 2)
        top = TOP + ROW_HEIGHT * row
        _draw_table(drawing, Box(*SPANS[column], top, top + PLOT_HEIGHT), result[name], PLOTS[name])
    return drawing


def _draw_table(drawing: Drawing, box: Box, rows: list[dict[str, float]], plot: Plot) -> None:
    xs = [row[plot.x] if plot.x else (row["from"] + row["to"]) / 2 for row in rows]
    colors = dict(zip(plot.curves, (ORANGE, BLUE, GREEN), strict=False))
    panel = Panel(
        drawing,
        box,
        title=plot.title,
        x_name=plot.x_name,
        x_end=max([1, *xs]),
        values=[row[column] for row in rows for column in plot.curves],
        labels=[Label(name, rows[-1][c], colors[c]) for c, name in plot.curves.items()],
        log=plot.log,
    )
    for column, color in colors.items():
        points = [(x, row[column]) for x, row in zip(xs, rows, strict=True)]
        panel.curve(points, color, dots=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="default: beside the first result, as .svg")
    arguments = parser.parse_args()
    output = arguments.output or arguments.results[0].with_suffix(".svg")
    result: dict[str, Any] = {}
    try:
        for path in arguments.results:
            result |= json.loads(path.read_text(encoding="utf-8"))
        draw(result, f"Evaluation of {result.get('model')}").save(output)
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"plot_evaluation.py: {path}: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
