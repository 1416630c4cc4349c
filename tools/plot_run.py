"""Draws the curves of a run, from its metrics.jsonl, as SVG.

    python tools/plot_run.py WORKDIR [--output=loss.svg] [--baseline "gzip -9=2.55" "xz -9e=1.75"]

At the left train and eval loss in nats per token, at the right bits per byte of the evaluations
and, as dashed lines, what --baseline names (tools/compression_baseline.py measures some).
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from svg_drawing import BLUE, MUTED, ORANGE, RULE, Drawing

WIDTH, HEIGHT = 900, 340
TOP, BOTTOM = 66, 286
LABEL_HEIGHT, LABEL_GAP, CHAR_WIDTH = 17, 10, 7.2

Curve = list[tuple[int, float]]


class Label(NamedTuple):
    """A name and a value at the right of a panel."""

    name: str
    value: float
    color: str

    @property
    def text(self) -> str:
        return f"{self.name}: {self.value:.2f}"


class Panel(NamedTuple):
    """A rectangle of the page, and the ranges that its axes cover."""

    left: float
    right: float
    last_step: int
    low: float
    high: float

    def x(self, step: float) -> float:
        return self.left + (self.right - self.left) * step / self.last_step

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)


def read_curves(path: Path) -> dict[str, Curve]:
    """Each metric's (step, value) pairs, steps ascending, without values that are not finite.

    Where the step goes back, a run was resumed from an earlier checkpoint: what it had written
    from there on no longer counts. A line cut off by a crash is skipped.
    """
    curves: dict[str, dict[int, float]] = {}
    last_step = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if step < last_step:
            for curve in curves.values():
                for discarded in [x for x in curve if x >= step]:
                    del curve[discarded]
        last_step = step
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, {})[step] = value
    return {name: list(curve.items()) for name, curve in curves.items() if curve}


def draw(curves: Mapping[str, Curve], baselines: Mapping[str, float], title: str) -> Drawing:
    """The page with both panels."""
    train, losses = curves.get("train/loss", []), curves.get("eval/loss", [])
    bits = curves.get("eval/bits_per_byte", [])
    last_step = max([1, *(step for step, _ in train + losses + bits)])
    drawing = Drawing(
        WIDTH, HEIGHT, title=title, description="Loss and bits per byte over training steps."
    )

    values = [value for _, value in train + losses]
    labels = [
        Label(name, curve[-1][1], color)
        for name, curve, color in (("train", train, BLUE), ("eval", losses, ORANGE))
        if curve
    ]
    panel = _panel(drawing, (58, 466), last_step, values, labels, "Loss, nats per token")
    _curve(drawing, panel, train, BLUE, dots=False)
    _curve(drawing, panel, losses, ORANGE, dots=True)

    values = [value for _, value in bits] + list(baselines.values())
    labels = [Label(name, value, MUTED) for name, value in baselines.items()]
    labels += [Label("this model", value, ORANGE) for _, value in bits[-1:]]
    panel = _panel(drawing, (526, 884), last_step, values, labels, "Evaluation, bits per byte")
    for value in baselines.values():
        y = panel.y(value)
        drawing.line(panel.left, y, panel.right, y, stroke=MUTED, stroke_dasharray="5 4")
    _curve(drawing, panel, bits, ORANGE, dots=True)
    return drawing


def _panel(
    drawing: Drawing,
    span: tuple[float, float],
    last_step: int,
    values: list[float],
    labels: list[Label],
    title: str,
) -> Panel:
    """Draws the frame: title, grid, numbers at the axes, and the labels at its right."""
    left = span[0]
    right = span[1] - LABEL_GAP - max([CHAR_WIDTH * len(label.text) for label in labels], default=0)
    ticks = _ticks(min(values), max(values)) if values else [0.0, 1.0]
    panel = Panel(left, right, last_step, low=ticks[0], high=ticks[-1])
    drawing.text(left, 36, title, size=15, font_weight=600)
    for value in ticks if values else []:
        y = panel.y(value)
        drawing.line(left, y, right, y, stroke=RULE)
        drawing.text(left - 8, y + 4, f"{value:g}", size=12, text_anchor="end", fill=MUTED)
    drawing.line(left, BOTTOM, right, BOTTOM, stroke=MUTED)
    for step in _ticks(0, last_step, count=4):
        if step <= last_step and step.is_integer():
            style = {"size": 12, "text_anchor": "middle", "fill": MUTED}
            drawing.text(panel.x(step), BOTTOM + 19, f"{step:,.0f}", **style)
    drawing.text((left + right) / 2, BOTTOM + 38, "steps", text_anchor="middle", fill=MUTED)
    if not values:
        middle = (TOP + BOTTOM) / 2
        drawing.text((left + right) / 2, middle, "no values yet", text_anchor="middle", fill=MUTED)
    _labels(drawing, panel, labels)
    return panel


def _curve(drawing: Drawing, panel: Panel, curve: Curve, color: str, dots: bool) -> None:
    points = [(panel.x(step), panel.y(value)) for step, value in curve]
    if points:
        d = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        drawing.path(d, stroke=color, stroke_width=2, stroke_linejoin="round")
    for x, y in points if dots or len(points) == 1 else []:
        drawing.circle(x, y, 3.2, fill=color)


def _labels(drawing: Drawing, panel: Panel, labels: list[Label]) -> None:
    """Puts labels at the heights of their values, or as close as they fit below each other."""
    labels = sorted(labels, key=lambda label: -label.value)
    heights = []
    for label in labels:
        above = heights[-1] + LABEL_HEIGHT if heights else -math.inf
        heights.append(max(above, panel.y(label.value) + 4))
    below = BOTTOM + LABEL_HEIGHT
    for label, height in reversed(list(zip(labels, heights, strict=True))):
        below = min(height, below - LABEL_HEIGHT)
        drawing.text(panel.right + LABEL_GAP, below, label.text, size=12, fill=label.color)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, from `low` or just below to `high` or just above."""
    rough = (high - low or abs(high) or 1.0) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]


def _baseline(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        if name and math.isfinite(float(value)):
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no NAME=BITS_PER_BYTE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--output", type=Path, help="default: WORKDIR/loss.svg")
    parser.add_argument(
        "--baseline", type=_baseline, nargs="+", action="extend", default=[], metavar="NAME=BITS"
    )
    arguments = parser.parse_args()
    metrics = arguments.workdir / "metrics.jsonl"
    output = arguments.output or arguments.workdir / "loss.svg"
    try:
        if not metrics.is_file():
            raise ValueError(f"no {metrics}, which train.py writes to its --workdir")
        curves = read_curves(metrics)
        if not {"train/loss", "eval/loss"} & curves.keys():
            raise ValueError(f"{metrics} has no train/loss and no eval/loss")
        draw(curves, dict(arguments.baseline), f"Training of {arguments.workdir.name}").save(output)
    except (ValueError, OSError) as error:
        print(f"plot_run.py: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
