"""Charts drawn with Pillow alone, and the loss curves of trainings:

    python -m lab.plots RUN [RUN ...] [--out FILE]     # one chart a stage, one colour a run
"""

import functools
import json
import math
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.sheets import file_ending, save_picture
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


def chart(series, title, x_label, y_label, log_y=False):
    """Curves {name: [(x, y), ...]} as a PIL image, with dots where the values are few; values that
    have no place on it are left out."""
    scale = math.log10 if log_y else float
    curves = {name: [(x, scale(y)) for x, y in values if math.isfinite(y) and (y > 0 or not log_y)]
              for name, values in series.items()}
    points = np.array(sum(curves.values(), []) or [(0, 0)])
    low, high = points.min(0), points.max(0)
    margin = 0.04 * (high - low) + (high == low)  # never an empty range
    (x_min, y_min), (x_max, y_max) = (low - margin).tolist(), (high + margin).tolist()
    under = 44 + 16 * math.ceil(len(curves) / 2)  # the axis, its label, and the curves' names
    left, top, right, bottom = 70, 44, SIZE[0] - 16, SIZE[1] - under
    sheet = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(sheet)
    write = functools.partial(pen.text, font=ImageFont.load_default(12))

    def place(x, y):
        return (left + (x - x_min) / (x_max - x_min) * (right - left),
                bottom - (y - y_min) / (y_max - y_min) * (bottom - top))

    for x in ticks(x_min, x_max):
        pen.line([place(x, y_min), place(x, y_max)], fill="#e4e4e4")
        write((place(x, y_min)[0], bottom + 4), f"{x:g}", "black", anchor="ma")
    for y in ticks(y_min, y_max):
        pen.line([place(x_min, y), place(x_max, y)], fill="#e4e4e4")
        number = f"{10 ** y if log_y else y:.3g}"
        write((left - 6, place(x_min, y)[1]), number, "black", anchor="rm")
    pen.rectangle([left, top, right, bottom], outline="black")
    for k, (name, values) in enumerate(curves.items()):
        colour, dots = CURVES[k % len(CURVES)], [place(*p) for p in values]
        pen.line(dots, fill=colour, width=2, joint="curve")
        for x, y in dots if len(dots) < 10 else []:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        write((left + (right - left) // 2 * (k % 2), bottom + 40 + 16 * (k // 2)), name, colour)
    write((left, 8), title, "black")
    write(((left + right) / 2, bottom + 20), x_label, "black", anchor="ma")
    write((4, top - 17), y_label, "black")
    return sheet


def plot_runs(runs):
    """Training and validation loss of every stage: one chart a stage, one colour a curve."""
    curves = defaultdict(lambda: defaultdict(dict))  # {stage: {name: {step: loss}}}
    for run in runs:
        path = Path(run) / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"no metrics at {path}: give the --out folder of a training")
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # a killed training may have left a broken line
                x = json.loads(line)
                for key, name in (("loss", str(run)), ("val_loss", f"{run}, validation")):
                    if key in x:  # if a step was done twice, the later one counts
                        curves[x["stage"]][name][x["step"]] = x[key]
    if not curves:
        raise UserError(f"{runs[0]} has no losses yet: train a little first")
    (width, height), columns = SIZE, min(2, len(curves))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(curves) / 2) * height), "white")
    for k, (stage, names) in enumerate(curves.items()):
        series = {name: sorted(curve.items()) for name, curve in names.items()}
        image = chart(series, stage, "training step", "loss", log_y=True)
        sheet.paste(image, (k % 2 * width, k // 2 * height))
    return sheet


@user_errors
def main(argv=None):
    parser = Parser("python -m lab.plots", description="Draw the loss curves of trainings.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a training")
    parser.add_argument("--out", type=file_ending(".png"), metavar="FILE",
                        help="the .png to write (default: loss.png in the first RUN)")
    args = parser.parse_args(argv)
    print(save_picture(plot_runs(args.runs), args.out or Path(args.runs[0]) / "loss.png"))


if __name__ == "__main__":
    sys.exit(main())
