"""Draws memory by length of the prefix, as benchmarks/long_prefix.py measured it, as SVG.

python tools/draw_long_prefix.py long_prefix.json [--output=docs/long_prefix.svg]
"""

import sys
from typing import Any

from svg_chart import Box, Label, Panel
from svg_drawing import BLUE, GREEN, ORANGE, Drawing, draw_result

WIDTH, HEIGHT = 900, 360
CURVES = {
    "streamed": ("Perceiver AR, streamed prefix", BLUE),
    "reference": ("Perceiver AR in perceiver-io", ORANGE),
    "dense": ("dense decoder", GREEN),
}


def draw(result: Any) -> Drawing | None:
    """The page; a curve ends at the last length that fitted into memory."""
    entries = result.get("entries") if isinstance(result, dict) else None
    if not any("peak_mib" in entry for entry in entries or ()):
        return None
    curves = {
        name: sorted(
            (entry["prefix"], entry["peak_mib"] / 1024)
            for entry in entries
            if entry["model"] == name and "peak_mib" in entry
        )
        for name in CURVES
    }
    curves = {name: points for name, points in curves.items() if points}
    lengths = [x for points in curves.values() for x, _ in points]
    drawing = Drawing(
        WIDTH,
        HEIGHT,
        title="Memory of a training step by length of the prefix",
        description="; ".join(f"{CURVES[name][0]}: {points}" for name, points in curves.items()),
    )
    panel = Panel(
        drawing,
        Box(left=66, right=880, top=64, bottom=296),
        title="Peak memory of a training step, GiB",
        x_name="tokens of prefix",
        x_begin=min(lengths),
        x_end=max(lengths),
        log=True,
        values=[0.0, *(y for points in curves.values() for _, y in points)],
        labels=[
            Label(CURVES[name][0], points[-1][1], CURVES[name][1])
            for name, points in curves.items()
        ],
    )
    for name, points in curves.items():
        panel.curve(points, CURVES[name][1], dots=True)
    return drawing


if __name__ == "__main__":
    sys.exit(
        draw_result(
            __doc__.splitlines()[0],
            draw,
            made_by="benchmarks/long_prefix.py prints",
            output="docs/long_prefix.svg",
        )
    )
