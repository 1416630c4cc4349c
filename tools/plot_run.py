"""Draws the curves of a run, from its metrics.jsonl, as SVG.

    python tools/plot_run.py WORKDIR [--output=loss.svg] [--baseline "gzip -9=2.55" "xz -9e=1.75"]

At the left train and eval loss in nats per token, at the right bits per byte of the evaluations
and, as dashed lines, what --baseline names (tools/compression_baseline.py measures some). Curves
begin after the first window of --config.log_every steps.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from svg_chart import Box, Curve, Label, Panel
from svg_drawing import BLUE, MUTED, ORANGE, Drawing

WIDTH, HEIGHT = 900, 340
TOP, BOTTOM = 66, 286


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
    train, losses, bits = (_after_first_window(curve, train) for curve in (train, losses, bits))
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
    axis = {"x_name": "steps", "x_end": last_step}
    box = Box(58, 466, TOP, BOTTOM)
    title = "Loss, nats per token"
    panel = Panel(drawing, box, title=title, values=values, labels=labels, **axis)
    panel.curve(train, BLUE, dots=False)
    panel.curve(losses, ORANGE, dots=True)

    values = [value for _, value in bits] + list(baselines.values())
    labels = [Label(name, value, MUTED) for name, value in baselines.items()]
    labels += [Label("this model", value, ORANGE) for _, value in bits[-1:]]
    box = Box(526, 884, TOP, BOTTOM)
    title = "Evaluation, bits per byte"
    panel = Panel(drawing, box, title=title, values=values, labels=labels, **axis)
    for value in baselines.values():
        y = panel.y(value)
        drawing.line(panel.left, y, panel.right, y, stroke=MUTED, stroke_dasharray="5 4")
    panel.curve(bits, ORANGE, dots=True)
    return drawing


def _after_first_window(curve: Curve, train: Curve) -> Curve:
    """The curve without its steepest part, which would flatten the rest, if there is a rest."""
    later = [(step, value) for step, value in curve if train and step > train[0][0]]
    return later if len(later) > 1 else curve


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
