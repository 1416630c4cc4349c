"""Draws docs/architecture.svg: how Perceiver AR reads m + n tokens and predicts after n of them.

python tools/draw_architecture.py [--output=docs/architecture.svg]
"""

import argparse
from pathlib import Path

from svg_drawing import (
    BLUE,
    EDGE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALE_BLUE,
    PALE_GREEN,
    PALE_ORANGE,
    RULE,
    Drawing,
)

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "architecture.svg"

TOKENS = ("The", "old", "ship", "had", "left", "the", "port", "and", "sailed", "far", "out", "to")
TARGETS = (*TOKENS[9:], "sea")
M, N = 8, 4  # prefix, latents
SHOWN = 2  # the latent whose view is drawn in full colour

WIDTH, HEIGHT = 900, 560
LEFT, PITCH, CELL = 34, 49, 45  # columns of tokens
NOTES = 650  # where the text at the right begins
TARGETS_Y, HEAD_Y, STACK_Y, LATENTS_Y, KEYS_Y, TOKENS_Y = 30, 84, 144, 326, 424, 462
CELL_HEIGHT, MASK_CELL = 28, 22


def draw() -> Drawing:
    drawing = Drawing(
        WIDTH,
        HEIGHT,
        title="Perceiver AR",
        description="The last n of m + n tokens are latents. In the first layer each latent "
        "attends to the prefix and to the latents up to itself; the other layers run over the "
        "latents only; a head tied to the token embedding predicts the next tokens.",
    )
    _tokens(drawing)
    _hybrid_layer(drawing)
    _decoder_layers(drawing)
    _head(drawing)
    _masks(drawing)
    return drawing


def _tokens(drawing: Drawing) -> None:
    for column, token in enumerate(TOKENS):
        fill, stroke = (PALE_BLUE, BLUE) if column < M else (PALE_ORANGE, ORANGE)
        _cell(drawing, column, TOKENS_Y, token, fill=fill, stroke=stroke)
    _brace(drawing, 0, M, "prefix: m tokens", BLUE)
    _brace(drawing, M, N, "latents: the last n tokens", ORANGE)
    _note(
        drawing,
        TOKENS_Y + 4,
        "m + n tokens",
        ["embedded; positions are rotary;", "m = n = 512 in the 455M model"],
    )


def _hybrid_layer(drawing: Drawing) -> None:
    _card(drawing, 0, M + N, LATENTS_Y - 22, KEYS_Y + 22 - (LATENTS_Y - 22))
    order = [latent for latent in range(N) if latent != SHOWN] + [SHOWN]
    for latent in order:
        for key in range(M + latent + 1):
            _sight(drawing, (key, KEYS_Y), (M + latent, LATENTS_Y), latent == SHOWN)
    for column in range(M + N):
        color = BLUE if column < M else ORANGE
        _up(drawing, _center(column), TOKENS_Y - 2, KEYS_Y + 9, stroke=color)
        _node(drawing, column, KEYS_Y, color)
    for latent in range(N):
        _node(drawing, M + latent, LATENTS_Y, ORANGE, is_shown=latent == SHOWN)
    _note(
        drawing,
        LATENTS_Y + 6,
        "Hybrid first layer",
        [
            "queries: the n latents",
            "keys and values: prefix and latents",
            "causal, n × (m + n) scores; MLP",
            "the prefix costs nothing after this",
        ],
    )


def _decoder_layers(drawing: Drawing) -> None:
    height = 116
    for offset in (10, 5, 0):
        _card(drawing, M, N, STACK_Y - offset, height, shift=offset)
    bottom, top = STACK_Y + height - 20, STACK_Y + 20
    for latent in [latent for latent in range(N) if latent != SHOWN] + [SHOWN]:
        for key in range(latent + 1):
            _sight(drawing, (M + key, bottom), (M + latent, top), latent == SHOWN)
    for latent in range(N):
        column = M + latent
        _up(drawing, _center(column), LATENTS_Y - 10, bottom + 8, stroke=ORANGE)
        _node(drawing, column, bottom, ORANGE)
        _node(drawing, column, top, ORANGE, is_shown=latent == SHOWN)
        _up(drawing, _center(column), top - 8, HEAD_Y + CELL_HEIGHT + 2, stroke=ORANGE)
    _note(
        drawing,
        STACK_Y + 26,
        "L − 1 decoder layers",
        ["causal self-attention and MLP", "over the latents only:", "n × n scores, whatever m is"],
    )


def _head(drawing: Drawing) -> None:
    x, width = _left(M), N * PITCH - (PITCH - CELL)
    drawing.rect(x, HEAD_Y, width, CELL_HEIGHT, rx=14, fill="#ffffff", stroke=MUTED)
    drawing.text(x + width / 2, HEAD_Y + 19, "tied head", text_anchor="middle")
    for latent, token in enumerate(TARGETS):
        _up(drawing, _center(M + latent), HEAD_Y - 2, TARGETS_Y + CELL_HEIGHT + 2, stroke=GREEN)
        _cell(drawing, M + latent, TARGETS_Y, token, fill=PALE_GREEN, stroke=GREEN)
    _note(
        drawing,
        TARGETS_Y + 16,
        "n next tokens",
        ["the token embedding, transposed,", "makes logits of each latent"],
    )


def _masks(drawing: Drawing) -> None:
    """Both causal masks, the columns of the latents above each other."""
    x = 100
    drawing.text(LEFT, 48, "Causal masks", size=15, font_weight=600)
    drawing.text(LEFT + 132, 48, "filled: the row's latent sees it", fill=MUTED)
    labels = ("m", M / 2, BLUE), ("n", M + N / 2, ORANGE)
    for label, columns, color in labels:
        center = x + columns * MASK_CELL
        drawing.text(center, 78, label, text_anchor="middle", fill=color, font_weight=600)
    _mask(drawing, x, 86, num_prefix=M)
    _mask(drawing, x + M * MASK_CELL, 190, num_prefix=0)
    drawing.text(LEFT, 78, "first layer:", fill=MUTED)
    drawing.text(LEFT, 226, "all other layers:", fill=MUTED)
    drawing.text(LEFT, 244, "the latents alone", fill=MUTED)


def _mask(drawing: Drawing, x: float, y: float, num_prefix: int) -> None:
    for row, token in enumerate(TOKENS[M:]):
        opacity = {"opacity": 1.0 if row == SHOWN else 0.45}
        for column in range(num_prefix + N):
            color = BLUE if column < num_prefix else ORANGE
            sees = column <= num_prefix + row
            style = {"fill": color} | opacity if sees else {"fill": "#ffffff", "stroke": RULE}
            size = MASK_CELL - 2
            drawing.rect(x + column * MASK_CELL, y + row * MASK_CELL, size, size, rx=3, **style)
        weight = 600 if row == SHOWN else 400
        style = {"size": 12, "text_anchor": "end", "font_weight": weight}
        drawing.text(x - 8, y + row * MASK_CELL + 15, token, **style)


def _left(column: int) -> float:
    return LEFT + column * PITCH


def _center(column: int) -> float:
    return _left(column) + CELL / 2


def _cell(drawing: Drawing, column: int, y: float, token: str, **style) -> None:
    drawing.rect(_left(column), y, CELL, CELL_HEIGHT, rx=5, **style)
    drawing.text(_center(column), y + 19, token, text_anchor="middle")


def _node(drawing: Drawing, column: int, y: float, color: str, is_shown: bool = False) -> None:
    ring = {"stroke": INK, "stroke_width": 2} if is_shown else {"stroke": "#ffffff"}
    drawing.circle(_center(column), y, 7.0, fill=color, **ring)


def _sight(drawing: Drawing, key: tuple, query: tuple, is_shown: bool) -> None:
    """A curve from a key up to the query that sees it."""
    (x1, y1), (x2, y2) = (_center(key[0]), key[1]), (_center(query[0]), query[1])
    middle = (y1 + y2) / 2
    color = BLUE if key[0] < M else ORANGE
    style = {"stroke_width": 1.4} if is_shown else {"opacity": 0.22}
    drawing.path(f"M{x1} {y1} C{x1} {middle} {x2} {middle} {x2} {y2}", stroke=color, **style)


def _up(drawing: Drawing, x: float, y1: float, y2: float, **style) -> None:
    drawing.line(x, y1, x, y2 + 5, stroke_width=1.4, **style)
    drawing.path(f"M{x - 3.5} {y2 + 6} L{x} {y2} L{x + 3.5} {y2 + 6}", stroke_width=1.4, **style)


def _card(drawing, first, columns, y, height, shift=0.0):
    x, width = _left(first) - 12 + shift, columns * PITCH - (PITCH - CELL) + 24
    drawing.rect(x, y, width, height, rx=10, fill="#ffffff", stroke=EDGE)


def _brace(drawing: Drawing, first: int, columns: int, label: str, color: str) -> None:
    x1, x2, y = _left(first), _left(first + columns - 1) + CELL, TOKENS_Y + CELL_HEIGHT + 10
    drawing.path(f"M{x1} {y} v6 H{x2} v-6", stroke=color, stroke_width=1.4)
    drawing.text((x1 + x2) / 2, y + 24, label, text_anchor="middle", fill=color, font_weight=600)


def _note(drawing: Drawing, y: float, title: str, lines: list[str]) -> None:
    drawing.text(NOTES, y, title, size=15, font_weight=600)
    for number, line in enumerate(lines, 1):
        drawing.text(NOTES, y + 18.5 * number, line, fill=MUTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    draw().save(parser.parse_args().output)


if __name__ == "__main__":
    main()
