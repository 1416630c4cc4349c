"""Draws the picture of the decoding policies.

python tools/draw_decoding.py [--output=docs/decoding.svg]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from svg_drawing import (
    BLUE,
    EDGE,
    MUTED,
    ORANGE,
    PALE_BLUE,
    PALE_ORANGE,
    RULE,
    Drawing,
)

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "decoding.svg"

N, MAX_PREFIX, REFILL = 4, 6, 2
PROMPT, PROMPT_LATENTS = 6, 2
LENGTHS = range(PROMPT + 1, 14)  # of the sequence, in each row
STAGES = {9: "latents used up", 11: "window full"}

WIDTH, HEIGHT = 900, 409
FIRST_PANEL, PANEL_PITCH, CELL = 106, 265, 19
ROWS_Y, ROW_PITCH, GAP = 76, 27, 22  # a gap before each row that STAGES names
LEGEND_Y = 340

OUTSIDE, PREFIX, FORMER, LATENT = "outside", "prefix", "former latent", "latent"
STYLES = {  # fill and stroke of what comes from the cache, and of what is computed in the step
    PREFIX: ((PALE_BLUE, BLUE), (BLUE, BLUE)),
    FORMER: ((PALE_ORANGE, BLUE), None),
    LATENT: ((PALE_ORANGE, ORANGE), (ORANGE, ORANGE)),
}

Step = tuple[list[str], int]  # what each token is, the oldest first; how many are computed


def slide(length: int) -> Step:
    prefix = PROMPT - PROMPT_LATENTS
    latents = min(length - prefix, N)
    kinds = [PREFIX] * prefix + [FORMER] * (length - prefix - latents) + [LATENT] * latents
    return _newest(kinds, N + MAX_PREFIX), 1


def recompute(length: int) -> Step:
    if length - (PROMPT - PROMPT_LATENTS) <= N:
        return slide(length)
    kinds = [PREFIX] * (length - N) + [LATENT] * N
    return _newest(kinds, N + MAX_PREFIX), N + MAX_PREFIX


def reset(length: int) -> Step:
    used_up = PROMPT - PROMPT_LATENTS + N
    if length <= used_up:
        return slide(length)
    since = (length - used_up - 1) % (N - REFILL + 1)  # tokens since the last full pass
    kinds = [PREFIX] * (length - since - REFILL) + [LATENT] * (since + REFILL)
    return _newest(kinds, MAX_PREFIX + REFILL + since), 1 if since else MAX_PREFIX + REFILL


def _newest(kinds: list[str], window: int) -> list[str]:
    dropped = max(len(kinds) - window, 0)
    return [OUTSIDE] * dropped + kinds[dropped:]


def draw() -> Drawing:
    drawing = Drawing(
        WIDTH,
        HEIGHT,
        title="Decoding policies",
        description="What each new token reads under slide, recompute and reset, for 4 latents "
        "and at most 6 tokens of prefix: under slide the oldest latent joins the prefix unchanged; "
        "recompute reads all tokens again for each new one; reset does so when the latents are "
        "used up, and leaves room for the next.",
    )
    for length in LENGTHS:
        label = f"new token {length - PROMPT}"
        drawing.text(FIRST_PANEL - 12, _y(length) + 14, label, text_anchor="end", fill=MUTED)
    for length, label in STAGES.items():
        y = _y(length) - 12
        drawing.text(14, y + 4, label, size=11, fill=MUTED)
        drawing.line(FIRST_PANEL, y, WIDTH - 14, y, stroke=EDGE)
    _panel(drawing, 0, slide, "slide", "one step per token")
    _panel(drawing, 1, recompute, "recompute", "then a full pass per token")
    _panel(
        drawing, 2, reset, "reset, refill = 2", f"then a full pass every {N - REFILL + 1} tokens"
    )
    _legend(drawing)
    return drawing


def _panel(drawing, panel: int, policy: Callable[[int], Step], name: str, cost: str) -> None:
    x = FIRST_PANEL + panel * PANEL_PITCH
    drawing.text(x, 34, name, size=15, font_weight=600)
    drawing.text(x, 53, cost, fill=MUTED)
    for length in LENGTHS:
        kinds, num_computed = policy(length)
        for column, kind in enumerate(kinds):
            is_computed = column >= length - num_computed
            _cell(drawing, x + column * CELL, _y(length), kind, is_computed=is_computed)


def _cell(drawing, x: float, y: float, kind: str, *, is_computed: bool) -> None:
    size = CELL - 3
    if kind == OUTSIDE:
        drawing.rect(x, y + 2, size, size, rx=3, fill="none", stroke=RULE, stroke_dasharray="2 2")
        return
    fill, stroke = STYLES[kind][is_computed]
    drawing.rect(x, y + 2, size, size, rx=3, fill=fill, stroke=stroke, stroke_width=1.3)


def _legend(drawing) -> None:
    rows = [
        (
            f"N = {N} latents",
            (PREFIX, False, "prefix"),
            (LATENT, False, "latent"),
            (FORMER, False, "prefix that was made as a latent"),
            (OUTSIDE, False, "no longer read"),
        ),
        (
            f"prefix ≤ {MAX_PREFIX}",
            (PREFIX, True, "prefix, computed in this step"),
            (LATENT, True, "latent, computed in this step; pale ones come from the caches"),
        ),
    ]
    for row, (size, *entries) in enumerate(rows):
        x, y = FIRST_PANEL, LEGEND_Y + row * ROW_PITCH
        drawing.text(x - 12, y + 14, size, text_anchor="end", fill=MUTED)
        for kind, is_computed, label in entries:
            _cell(drawing, x, y, kind, is_computed=is_computed)
            drawing.text(x + CELL + 4, y + 14, label, fill=MUTED)
            x += CELL + 24 + 6.6 * len(label)


def _y(length: int) -> float:
    gaps = sum(first <= length for first in STAGES)
    return ROWS_Y + (length - LENGTHS[0]) * ROW_PITCH + gaps * GAP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    draw().save(parser.parse_args().output)


if __name__ == "__main__":
    main()
