"""Charts drawn with Pillow alone, and the loss curves of trainings:

    python -m lab.plots RUN [RUN ...] [--out FILE]     # one chart a stage, one colour a run
"""

import json
import math
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from support.sheets import save_picture
from support.tools import Parser, UserError, user_errors

CURVES = ("#1f4e9c", "#c8372d", "#2d8a3e", "#8a4fbf", "#c77f17", "#3a9fa8", "#777777", "#b0487f")
SIZE = 640, 400  # of a chart, pixels


def ticks(low, high, count=5):
    """Round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    step = (high - low) / count
    power = 10 ** math.floor(math.log10(step))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - step))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Logarithms of the numbers 1, 2, 5, 10, 20, ... between 10 ** low and 10 ** high."""
    logs = [math.log10(m) + power for power in range(math.floor(low), math.ceil(high) + 1)
            for m in (1, 2, 5)]
    return [y for y in logs if low <= y <= high]


def widened(values):
    """A range a little wider than the values, and never empty."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin


def chart(series, title, x_label, y_label, log_y=False, points=False, ends=()):
    """Curves {name: [(x, y), ...]} as a PIL image; values that have no place on it are left out.
    points: draw a dot at each value. ends: labels for the first and the last value of each curve.
    """
    scale = math.log10 if log_y else float
    curves = {name: [(x, scale(y)) for x, y in values if math.isfinite(y) and (y > 0 or not log_y)]
              for name, values in series.items()}
    xs, ys = zip(*[p for values in curves.values() for p in values] or [(0, 0)], strict=True)
    (x_min, x_max), (y_min, y_max) = widened(xs), widened(ys)
    under = 44 + 16 * math.ceil(len(curves) / 2)  # the axis, its label, and the curves' names
    left, top, right, bottom = 70, 44, SIZE[0] - 16, SIZE[1] - under
    sheet = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def place(x, y):
        return (left + (x - x_min) / (x_max - x_min) * (right - left),
                bottom - (y - y_min) / (y_max - y_min) * (bottom - top))

    def write(x, y, text, anchor, fill="black"):
        pen.text((x, y), text, fill=fill, font=font, anchor=anchor)

    for x in ticks(x_min, x_max):
        pen.line([place(x, y_min), place(x, y_max)], fill="#e4e4e4")
        write(place(x, y_min)[0], bottom + 4, f"{x:g}", "ma")
    for y in (log_ticks if log_y else ticks)(y_min, y_max):
        pen.line([place(x_min, y), place(x_max, y)], fill="#e4e4e4")
        write(left - 6, place(x_min, y)[1], f"{10 ** y:.3g}" if log_y else f"{y:g}", "rm")
    pen.rectangle([left, top, right, bottom], outline="black")
    for k, (name, values) in enumerate(curves.items()):
        colour, dots = CURVES[k % len(CURVES)], [place(*p) for p in values]
        pen.line(dots, fill=colour, width=2, joint="curve")
        for x, y in dots if points or len(dots) == 1 else []:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        marks = list(zip(dots[::max(1, len(dots) - 1)], ends))
        if len(marks) == 2 and math.dist(dots[0], dots[-1]) < 14:  # no label on top of the other
            marks = [(max(dots[0], dots[-1]), ", ".join(ends))]
        for (x, y), text in marks:
            write(x + 6, y, text, "lm", colour)
        write(left + (right - left) // 2 * (k % 2), bottom + 40 + 16 * (k // 2), name, "la", colour)
    write(left, 8, title, "la")
    write((left + right) / 2, bottom + 20, x_label, "ma")
    write(4, top - 17, y_label, "la")
    return sheet


def read_metrics(run):
    """The lines of a run's metrics.jsonl, without one that a killed training left broken."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no metrics at {path}: give the --out folder of a training")
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def plot_runs(runs):
    """Training and validation loss of every stage: one chart a stage, one colour a curve."""
    curves = defaultdict(lambda: defaultdict(dict))  # {stage: {name: {step: loss}}}
    for run in runs:
        for x in read_metrics(run):
            for key, name in (("loss", str(run)), ("val_loss", f"{run}, validation")):
                if key in x:  # if a step was done twice, the later one counts
                    curves[x["stage"]][name][x["step"]] = x[key]
    if not curves:
        raise UserError(f"{runs[0]} has no losses yet: train a little first")
    charts = [chart({name: sorted(curve.items()) for name, curve in names.items()}, stage,
                    "training step", "loss", log_y=True) for stage, names in curves.items()]
    rows = -(-len(charts) // 2)  # rounded up
    sheet = Image.new("RGB", (min(2, len(charts)) * SIZE[0], rows * SIZE[1]), "white")
    for k, image in enumerate(charts):
        sheet.paste(image, (k % 2 * SIZE[0], k // 2 * SIZE[1]))
    return sheet


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.plots", description="Draw the loss curves of trainings.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training")
    parser.add_argument("--out", help="the PNG to write (default: loss.png in the first RUN)")
    args = parser.parse_args(argv)
    path = Path(args.out or Path(args.runs[0]) / "loss.png")
    save_picture(plot_runs(args.runs), path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
