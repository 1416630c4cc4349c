"""A page of SVG with the colours and type that our pictures share."""

import argparse
import json
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

# The page brings its own background, so that it reads the same on light and dark web pages.
PAPER, EDGE, RULE = "#fcfbf8", "#d9d4c8", "#e4dfd3"
INK, MUTED = "#1f2a37", "#5d6875"
BLUE, PALE_BLUE = "#4a76a8", "#dbe6f3"
ORANGE, PALE_ORANGE = "#d1701c", "#fbe3cb"
GREEN, PALE_GREEN = "#3b8f57", "#d7eedd"
FONT = "-apple-system, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, sans-serif"


class Drawing:
    """Collects shapes; `svg` is the document."""

    def __init__(self, width: int, height: int, *, title: str, description: str):
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family="{FONT}">\n'
            f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>"
        )
        self._shapes: list[str] = []
        self.rect(0.5, 0.5, width - 1, height - 1, fill=PAPER, stroke=EDGE, rx=10)

    def rect(self, x: float, y: float, width: float, height: float, **style) -> None:
        self._add("rect", {"x": x, "y": y, "width": width, "height": height} | style)

    def circle(self, x: float, y: float, r: float, **style) -> None:
        self._add("circle", {"cx": x, "cy": y, "r": r} | style)

    def line(self, x1: float, y1: float, x2: float, y2: float, **style) -> None:
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2} | style)

    def path(self, d: str, **style) -> None:
        self._add("path", {"d": d, "fill": "none"} | style)

    def text(self, x: float, y: float, text: str, *, size: float = 13, **style) -> None:
        style = {"x": x, "y": y, "font_size": size, "fill": INK} | style
        self._add("text", style, escape(text))

    @property
    def svg(self) -> str:
        return "\n".join([self._head, *self._shapes, "</svg>\n"])

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.svg, encoding="utf-8")

    def _add(self, tag: str, attributes: dict, content: str = "") -> None:
        pairs = (f'{name.replace("_", "-")}="{_plain(x)}"' for name, x in attributes.items())
        self._shapes.append(f"<{tag} {' '.join(pairs)}>{content}</{tag}>")


def draw_result(
    description: str, draw: Callable[[Any], Drawing | None], *, made_by: str, output: str
) -> int:
    """The command of a script that draws a benchmark's JSON; returns the exit code.

    Args:
      description: the first line of its help.
      draw: of the JSON; gives None for what is not a result.
      made_by: which script makes it, in what way.
      output: where the picture goes by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("result", type=Path)
    parser.add_argument("--output", type=Path, default=Path(output))
    arguments = parser.parse_args()
    try:
        drawing = draw(json.loads(arguments.result.read_text()))
        if drawing is None:
            raise ValueError(f"{arguments.result} is not what {made_by}")
        drawing.save(arguments.output)
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
