"""Curves over an axis, with round numbers at the grid and names at the ends of the curves."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from svg_drawing import MUTED, RULE, Drawing

LABEL_HEIGHT, LABEL_GAP, CHAR_WIDTH = 17, 10, 7.2

Curve = Sequence[tuple[float, float]]


class Label(NamedTuple):
    """A name and a value at the right of a panel."""

    name: str
    value: float
    color: str

    @property
    def text(self) -> str:
        return f"{self.name}: {self.value:.2f}"


class Box(NamedTuple):
    """A rectangle of the page."""

    left: float
    right: float
    top: float
    bottom: float


class Panel:
    """A frame with its title, grid, numbers at both axes and labels at the right; draws curves.

    Args:
      drawing: the page.
      box: where, the labels included; title and numbers are outside of it.
      title: above.
      x_name: below the horizontal axis.
      x_end: the last value of the horizontal axis.
      values: all that will be drawn; without any, the panel says so.
      labels: see `Label`.
      log: whether the horizontal axis shows log2(1 + x).
      x_begin: the first value of the horizontal axis.
    """

    def __init__(
        self,
        drawing: Drawing,
        box: Box,
        *,
        title: str,
        x_name: str,
        x_end: float,
        values: Sequence[float],
        labels: Sequence[Label],
        log: bool = False,
        x_begin: float = 0.0,
    ):
        self._drawing, self._log, self._x_begin, self._x_end = drawing, log, x_begin, x_end
        longest = max([CHAR_WIDTH * len(label.text) for label in labels], default=0)
        self._box = box = box._replace(right=box.right - LABEL_GAP - longest)
        y_ticks = _ticks(min(values), max(values)) if values else [0.0, 1.0]
        self._low, self._high = y_ticks[0], y_ticks[-1]
        self.left, self.right = box.left, box.right
        middle = (box.left + box.right) / 2
        drawing.text(box.left, box.top - 30, title, size=15, font_weight=600)
        for value in y_ticks if values else []:
            y = self.y(value)
            drawing.line(box.left, y, box.right, y, stroke=RULE)
            drawing.text(box.left - 8, y + 4, f"{value:g}", size=12, text_anchor="end", fill=MUTED)
        drawing.line(box.left, box.bottom, box.right, box.bottom, stroke=MUTED)
        for value in self._x_ticks():
            style = {"size": 12, "text_anchor": "middle", "fill": MUTED}
            drawing.text(self.x(value), box.bottom + 19, f"{value:,.0f}", **style)
        drawing.text(middle, box.bottom + 38, x_name, text_anchor="middle", fill=MUTED)
        if not values:
            style = {"text_anchor": "middle", "fill": MUTED}
            drawing.text(middle, (box.top + box.bottom) / 2, "no values yet", **style)
        self._draw_labels(labels)

    def x(self, value: float) -> float:
        scale = (lambda x: math.log2(1 + x)) if self._log else float
        first, last = scale(self._x_begin), scale(self._x_end)
        share = (scale(value) - first) / (last - first)
        return self._box.left + (self._box.right - self._box.left) * share

    def y(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return self._box.bottom - (self._box.bottom - self._box.top) * share

    def curve(self, points: Curve, color: str, *, dots: bool) -> None:
        """A line through the points; a single point is always a dot."""
        points = [(self.x(x), self.y(y)) for x, y in points]
        if points:
            d = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self._drawing.path(d, stroke=color, stroke_width=2, stroke_linejoin="round")
        for x, y in points if dots or len(points) == 1 else []:
            self._drawing.circle(x, y, 3.2, fill=color)

    def _x_ticks(self):
        if self._log:
            powers = [4**i for i in range(1, 16)]
            between = [x for x in powers if 1.6 * self._x_begin < x < self._x_end / 1.6]
            return [self._x_begin, *between, self._x_end]
        ticks = _ticks(self._x_begin, self._x_end, count=4)
        return [tick for tick in ticks if tick <= self._x_end and tick.is_integer()]

    def _draw_labels(self, labels):
        """Puts labels at the heights of their values, or as close as they fit below each other."""
        labels = sorted(labels, key=lambda label: -label.value)
        heights = []
        for label in labels:
            above = heights[-1] + LABEL_HEIGHT if heights else -math.inf
            heights.append(max(above, self.y(label.value) + 4))
        below = self._box.bottom + LABEL_HEIGHT
        for label, height in reversed(list(zip(labels, heights, strict=True))):
            below = min(height, below - LABEL_HEIGHT)
            x = self._box.right + LABEL_GAP
            self._drawing.text(x, below, label.text, size=12, fill=label.color)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, from `low` or just below to `high` or just above."""
    rough = (high - low or abs(high) or 1.0) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]
