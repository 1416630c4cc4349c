"""Draws what benchmarks/prefix_gain.py measured, as SVG.

    python tools/draw_prefix_gain.py prefix_gain.json [--output=docs/prefix_gain.svg]

At the left the loss of each model after its own prefix; at the right how much less each target
costs after the longest prefix than after none, by its place among the latents, for the model that
was trained with the longest.
"""

import sys
from typing import Any

from svg_drawing import BLUE, MUTED, ORANGE, RULE, Drawing, draw_result

WIDTH, HEIGHT = 900, 330
TOP, BOTTOM = 70, 260
LEFT_PANEL, RIGHT_PANEL = (66, 430), (526, 876)


def draw(result: Any) -> Drawing | None:
    """The page with both panels."""
    if not isinstance(result, dict) or not result.get("models"):
        return None
    drawing = Drawing(
        WIDTH,
        HEIGHT,
        title="What the prefix buys",
        description="Loss by length of the prefix, and the gain by place among the latents.",
    )
    models = result["models"]
    own = [model["read"][-1] for model in models]
    names = [f"{entry['prefix']:,}" for entry in own]
    _bars(
        drawing,
        LEFT_PANEL,
        [entry["loss"] for entry in own],
        names,
        BLUE,
        title="Loss after the model's own prefix, nats",
        below="tokens of prefix",
        from_zero=False,
    )
    shortest, longest = models[-1]["read"][0], models[-1]["read"][-1]
    gains = [a - b for a, b in zip(shortest["by_part"], longest["by_part"], strict=True)]
    size = result["arguments"]["latents"] // len(gains)
    _bars(
        drawing,
        RIGHT_PANEL,
        gains,
        [f"{number * size}" for number in range(len(gains))],
        ORANGE,
        title=f"Gain of {longest['prefix']:,} tokens of prefix over none",
        below="latents from",
        from_zero=True,
    )
    return drawing


def _bars(drawing, span, values, names, color, *, title, below, from_zero) -> None:
    left, right = span
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    else:  # an axis of at least 0.1 nats, so that noise does not look like a difference
        low = high - max(0.1, 1.5 * (high - low))
    drawing.text(left - 40, 34, title, size=15, font_weight=600)
    y = lambda value: BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low or 1.0)
    for value in (low, (low + high) / 2, high):
        drawing.line(left, y(value), right, y(value), stroke=RULE)
        drawing.text(left - 8, y(value) + 4, f"{value:.3f}", size=12, text_anchor="end", fill=MUTED)
    step = (right - left) / len(values)
    base = y(max(low, 0.0) if from_zero else low)
    for number, (value, name) in enumerate(zip(values, names, strict=True)):
        x, top = left + step * (number + 0.2), min(y(value), base)
        drawing.rect(x, top, step * 0.6, abs(base - y(value)), fill=color)
        middle = {"text_anchor": "middle", "size": 12}
        drawing.text(x + step * 0.3, top - 5, f"{value:.3f}", **middle)
        drawing.text(x + step * 0.3, BOTTOM + 19, name, fill=MUTED, **middle)
    drawing.line(left, base, right, base, stroke=MUTED)
    drawing.text((left + right) / 2, BOTTOM + 42, below, text_anchor="middle", fill=MUTED)


if __name__ == "__main__":
    sys.exit(
        draw_result(
            __doc__.splitlines()[0],
            draw,
            made_by="benchmarks/prefix_gain.py writes after its first model",
            output="docs/prefix_gain.svg",
        )
    )
