"""What every command needs and none of it is about unCLIP: device, processes, arguments, pictures.

A student can skip this file. What is worth knowing: precision is chosen in `autocast`; a user's
mistake is a UserError, which `exit_code` turns into one line and exit code 2; and charts are drawn
with Pillow alone, since a chart is only a map from data to pixels.
Read next: sample.py, which puts the stages together.
"""

import argparse
import functools
import json
import math
import os
import re
import signal
import sys
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from data import UserError

# --- the machine -----------------------------------------------------------------------------


def choose_device(name):
    """ "auto", "cpu", "cuda", "cuda:1", ... -> torch.device. Raises UserError if it isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                        "devices; use --device cpu or auto")
    return device


def autocast(device):
    """Compute in bfloat16 where the hardware multiplies it fast; weights stay in float32."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    fast = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else cpu_is_fast_in_bf16()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@functools.lru_cache
def cpu_is_fast_in_bf16():
    """Whether this CPU multiplies bfloat16 faster than float32: not all that can do it are.

    AMX is made for it, and AMD's AVX512-BF16 was twice as fast. Intel's AVX512-BF16 without AMX
    (as in some virtual machines) was not: 150 against 263 GFLOP/s. tests/bench.py prints both.
    """
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        intel = True
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() and not intel


def usable_cores():
    """Processor cores that this process may use, which `taskset` can make fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


# --- processes --------------------------------------------------------------------------------


def rank():
    """Which of the processes this is: 0 when there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def note(text):
    """Print, once however many processes there are."""
    if rank() == 0:
        print(text)


def first_alone(make):
    """make(), by the first process and then by the others, which find what it left on disk."""
    if rank() > 0:
        dist.barrier()
    made = make()
    if rank() == 0 and world_size() > 1:
        dist.barrier()
    return made


class Interrupt:
    """Ctrl-C asks the loop to stop after the step it is in, where everything fits together."""

    def __enter__(self):
        self.asked, self.agreed = False, False
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        self.asked = True
        self.__exit__()  # a second Ctrl-C stops at once

    def agree(self, device):
        """Of several processes all must stop after the same step, or some would wait for ever.
        Of several GPUs each waits for its own here, so they are asked at every tenth step only."""
        self.agreed = self.asked
        if world_size() > 1:
            asked = torch.tensor(float(self.asked), device=device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.agreed = asked.item() > 0

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def peak_memory(device):
    """Most memory this process has held so far, GB: the GPU's, or on a CPU the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --- the command line -------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None and False: those the help's own words explain, if need be."""

    def _get_help_string(self, action):
        said = action.default is None or action.default is False
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Defaults in the help; a wrong argument becomes one line instead of a page of usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=Help, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def known_failure(e):
    """What to do about a failure that is the machine's and not the program's; None of any other."""
    words = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
    memory = ("allocate memory", "ALLOC_FAILED", "is killed by signal")
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(m in str(e) for m in memory):
        return (f"out of memory ({words}); try a smaller --batch-size or fewer --workers in "
                "training, a smaller -n or --size in drawing")
    if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile cannot work here ({words}); leave --compile out"
    return None


def exit_code(main):
    """Make main(argv=None) return 0, or 2 after a user's mistake: one line on stderr."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
        except UserError as e:
            # One raised in a worker process arrives as a whole traceback, the message last.
            message = str(e).strip().splitlines()[-1].removeprefix("data.UserError: ")
            print(f"error: {message}", file=sys.stderr)
            return 2
        except OSError as e:  # a full disk, a folder that is a file, no permission, ...
            where = f"{e.filename}: " if e.filename else ""
            print(f"error: {where}{e.strerror or e}; check the path and the room", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as e:
            message = known_failure(e)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as e:
            print(f"stopped. {e}", file=sys.stderr)
            return 130  # what a shell reports after Ctrl-C
        return 0

    return wrapped


def at_least(least, bits=48):
    """An argument's type: whole numbers from `least` up, below 2^bits."""

    def whole_number(text):
        value = int(text)
        if not least <= value < 2**bits:
            allowed = f"{least} or more, and below 2^{bits}"
            raise argparse.ArgumentTypeError(f"{value}: must be {allowed}")
        return value

    return whole_number


natural, positive, two_or_more = at_least(0), at_least(1), at_least(2)
# sample.generators multiplies seeds by 8, and PyTorch's CPU generator uses 32 bits of the result.
seed_number = at_least(0, bits=29)


def finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
    return value


def positive_number(text):
    value = finite(text)
    if not 0 < value < 1e30:  # beyond, float32 would soon be at its end
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and below 1e30")
    return value


def fraction(text):
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value


# --- pictures on disk ------------------------------------------------------------------------


def to_pil(picture):
    """(3, H, W) in [-1, 1] -> PIL RGB. Fixed limits, never a picture's own minimum and maximum."""
    picture = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())


def draw_grid(pictures, captions=None, columns=4, cell=None):
    """Pictures (n, 3, H, W), or n of (3, H, W), in rows with their captions under -> PIL image.

    cell: side of a picture in the grid, pixels (default: at least 128, so that small ones show).
    """
    cell = cell or max(128, *(p.shape[-1] for p in pictures))
    font = ImageFont.load_default(max(13, cell // 12))
    # Captions are wrapped to the cell's width; the longest decides the height of every row.
    captions = captions or [""] * len(pictures)
    lines = [textwrap.wrap(c, width=max(8, int(cell / font.getlength("e")))) for c in captions]
    line = int(font.size * 1.25)
    under = 6 + line * max(len(x) for x in lines) if any(captions) else 0
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 4) + 4, rows * (cell + under + 4) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for k, picture in enumerate(pictures):
        x, y = 4 + k % columns * (cell + 4), 4 + k // columns * (cell + under + 4)
        whole = cell % picture.shape[-1] == 0  # each pixel becomes a square, or is resampled
        resample = Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC
        sheet.paste(to_pil(picture).resize((cell, cell), resample), (x, y))
        for i, words in enumerate(lines[k]):
            pen.text((x, y + cell + 2 + i * line), words, fill="black", font=font)
    return sheet


def check_folder(path):
    """UserError where nothing can be written into `path`: to be asked before the work. It is not
    made yet, as other mistakes should leave nothing behind."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write into {path}: {there} is not a folder, or not open to you; "
                        "give another --out")


def save_picture(image, path, **options):
    """image.save, with a full disk or a bad path as a UserError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {path}: {e}") from e


class Film:
    """Collects (x_t, predicted x_0) at each denoising step, side by side, for an animated GIF."""

    def __init__(self):
        self.frames = []

    def __call__(self, k, t, x_t, pred_x_0):
        both = torch.cat([x_t[0].float(), pred_x_0[0].float()], dim=2).clamp(-1, 1)  # (3, H, 2W)
        image = to_pil(both)
        self.frames.append(
            image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)
        )

    def save(self, path):
        durations = [80] * (len(self.frames) - 1) + [1500]  # milliseconds
        save_picture(self.frames[0], path, save_all=True, append_images=self.frames[1:],
                     duration=durations, loop=0)


# --- charts ------------------------------------------------------------------------------------

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
