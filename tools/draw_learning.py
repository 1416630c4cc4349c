"""Draws what benchmarks/learning.py measured, as SVG: loss by step and by CPU time.

python tools/draw_learning.py learning.json [--output=docs/learning.svg]
"""

import itertools
import sys
from typing import Any

from svg_chart import Box, Label, Panel
from svg_drawing import BLUE, ORANGE, Drawing, draw_result

WIDTH, HEIGHT = 960, 350
COLORS = {"perceiver-io": ORANGE, "ours": BLUE}
WINDOW = 20  # steps whose mean is a point


def draw(result: Any) -> Drawing | None:
    """The page with both panels."""
    if not isinstance(result, dict) or len(result.get("losses", {}).get("ours", ())) < WINDOW:
        return None
    means = {name: _means(result["losses"][name]) for name in COLORS}
    steps = [WINDOW * (i + 1) for i in range(len(means["ours"]))]
    minutes = {
        name: [t / 60 for t in itertools.accumulate(result["seconds"][name])] for name in COLORS
    }
    by_step = {name: list(zip(steps, means[name], strict=True)) for name in COLORS}
    by_time = {
        name: [(minutes[name][step - 1], loss) for step, loss in by_step[name]] for name in COLORS
    }
    drawing = Drawing(
        WIDTH,
        HEIGHT,
        title="perceiver-ar-jax and perceiver-io learn side by side",
        description="Loss of both by step, where the curves coincide, and by CPU time.",
    )
    _panel(drawing, (66, 480), by_step, "Loss by step, nats per byte", "steps")
    _panel(drawing, (546, 945), by_time, "Loss by time", "minutes of one core")
    return drawing


def _means(losses: list[float]) -> list[float]:
    whole = len(losses) // WINDOW * WINDOW
    return [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, whole, WINDOW)]


def _panel(drawing, span, curves, title, x_name) -> None:
    losses = [loss for points in curves.values() for _, loss in points]
    panel = Panel(
        drawing,
        Box(left=span[0], right=span[1], top=64, bottom=286),
        title=title,
        x_name=x_name,
        x_end=max(points[-1][0] for points in curves.values()),
        values=losses,
        labels=[Label(name, points[-1][1], COLORS[name]) for name, points in curves.items()],
    )
    for name, points in curves.items():
        panel.curve(points, COLORS[name], dots=False)


if __name__ == "__main__":
    sys.exit(
        draw_result(
            __doc__.splitlines()[0],
            draw,
            made_by=f"benchmarks/learning.py writes after {WINDOW} steps",
            output="docs/learning.svg",
        )
    )
