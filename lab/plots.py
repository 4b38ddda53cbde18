"""Charts, drawn with Pillow alone."""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from support.tools import UserError

CURVES = ("#1f4e9c", "#c8372d", "#2d8a3e", "#8a4fbf", "#c77f17", "#3a9fa8", "#777777", "#b0487f")


def ticks(low, high, count=5):
    """Round numbers between low and high: steps of 1, 2 or 5 times a power of ten."""
    step = (high - low) / count or 1.0
    power = 10 ** math.floor(math.log10(step))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - step))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """Logarithms of the numbers 1, 2, 5, 10, 20, ... between 10 ** low and 10 ** high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    logs = [math.log10(m) + power for power in powers for m in (1, 2, 5)]
    return [y for y in logs if low <= y <= high]


def chart(series, title, x_label, y_label, log_y=False, size=(640, 400), points=False,
          ends=None):
    """Curves as a picture.

    series: {name: [(x, y), ...]}; values that are not finite are left out. log_y: a logarithmic y
    axis, for positive values. points: a dot at each value. ends: what to write at the first and the
    last value of a curve. Returns a PIL image.
    """
    scale = math.log10 if log_y else float
    curves = {
        name: [(x, scale(y)) for x, y in values
               if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
        for name, values in series.items()
    }
    xs, ys = zip(*[p for values in curves.values() for p in values] or [(0.0, 0.0)])
    (x_min, x_max), (y_min, y_max) = (widened(min(v), max(v)) for v in (xs, ys))
    under = 44 + 16 * math.ceil(len(curves) / 2)  # the axis, its label, and the names below them
    left, top, right, bottom = 70, 44, size[0] - 16, size[1] - under
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def place(x, y):
        return (left + (x - x_min) / (x_max - x_min) * (right - left),
                bottom - (y - y_min) / (y_max - y_min) * (bottom - top))

    for x in ticks(x_min, x_max):
        pen.line([place(x, y_min), place(x, y_max)], fill="#e4e4e4")
        pen.text((place(x, y_min)[0], bottom + 4), f"{x:g}", fill="black", font=font, anchor="ma")
    for y in (log_ticks if log_y else ticks)(y_min, y_max):
        pen.line([place(x_min, y), place(x_max, y)], fill="#e4e4e4")
        label = f"{10 ** y:.3g}" if log_y else f"{y:g}"
        pen.text((left - 6, place(x_min, y)[1]), label, fill="black", font=font, anchor="rm")
    pen.rectangle([left, top, right, bottom], outline="black")
    for k, (name, values) in enumerate(curves.items()):
        colour = CURVES[k % len(CURVES)]
        if len(values) > 1:
            pen.line([place(*p) for p in values], fill=colour, width=2, joint="curve")
        for x, y in (place(*p) for p in (values if points or len(values) == 1 else [])):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        marks = list(zip((place(*p) for p in values[::max(1, len(values) - 1)]), ends or ()))
        if len(marks) == 2 and math.dist(marks[0][0], marks[1][0]) < 14:  # no text over the other
            marks = [(max(marks)[0], ", ".join(ends))]
        for (x, y), text in marks:
            pen.text((x + 6, y), text, fill=colour, font=font, anchor="lm")
        names = left + (right - left) // 2 * (k % 2), bottom + 40 + 16 * (k // 2)
        pen.text(names, name, fill=colour, font=font)
    pen.text((left, 6), title, fill="black", font=ImageFont.load_default(14))
    pen.text(((left + right) / 2, bottom + 20), x_label, fill="black", font=font, anchor="ma")
    pen.text((4, top - 17), y_label, fill="black", font=font)
    return sheet


def widened(low, high):
    """A range that is never empty, and a little wider than the values."""
    margin = 0.04 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin


def read_metrics(run):
    """A run's metrics.jsonl -> list of dicts. Lines that are broken, or without a loss that has a
    place on a logarithmic axis, are left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no metrics at {path}: give the --out folder of a training")
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            x = json.loads(line)
            losses = [float(x[key]) for key in ("loss", "val_loss") if key in x]
            fine = isinstance(x["stage"], str) and type(x["step"]) is int and losses
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            continue
        if fine and all(1e-30 < abs(loss) < 1e30 or loss != loss for loss in losses):
            lines.append(x)
    if not lines:
        raise UserError(f"{path} is empty: train a little first")
    return lines


def plot_runs(runs):
    """Training and validation loss of every stage, one chart a stage, one colour a curve."""
    metrics = {str(run): read_metrics(run) for run in runs}
    short = [Path(run).name for run in metrics]
    names = {run: Path(run).name if short.count(Path(run).name) == 1 else run for run in metrics}
    stages = dict.fromkeys(line["stage"] for lines in metrics.values() for line in lines)
    charts = []
    for stage in stages:
        series = {}
        for run, lines in metrics.items():
            for key, name in (("loss", ""), ("val_loss", ", validation")):
                curve = [(x["step"], x[key]) for x in lines if x["stage"] == stage and key in x]
                if curve:  # of steps done twice, before and after an interruption, the later one
                    series[names[run] + name] = sorted(dict(curve).items())
        if series:
            charts.append(chart(series, stage, "training step", "loss", log_y=True))
    columns = min(2, len(charts))
    width, height = charts[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(charts) // columns) * height), "white")
    for k, image in enumerate(charts):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet
