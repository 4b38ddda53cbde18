"""Pictures as tensors, as sheets with captions, as files and as films.

The networks' pictures are float32 tensors (3, H, W) in [-1, 1], files hold integers from 0 to 255.
Between them are fixed limits, not a picture's own, so a pale drawing stays pale.
"""

import math
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from support.tools import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def to_tensor(picture):
    """PIL RGB picture -> float32 (3, H, W) in [-1, 1]: 0 becomes -1, 255 becomes 1."""
    pixels = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_pil(picture):
    """(3, H, W) -> PIL RGB picture; values outside [-1, 1] are clipped."""
    picture = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())


def draw_grid(pictures, captions=None, columns=4, cell=None):
    """n pictures (3, H, W) in rows, each with its caption below -> PIL picture. cell: the side of a
    picture on the sheet in pixels (default: the pictures' own, but at least 128)."""
    cell = cell or max(128, *(p.shape[-1] for p in pictures))
    font = ImageFont.load_default(max(13, cell // 12))
    # Captions are wrapped to the cell's width; the longest one sets the height of all rows.
    captions = captions or [""] * len(pictures)
    width = max(8, int(cell / font.getlength("e")))
    lines = [textwrap.wrap(c, width, max_lines=8, placeholder=" ...") for c in captions]
    line = int(font.size * 1.25)
    under = 6 + line * max(map(len, lines)) if any(captions) else 0
    wide, high = cell + 4, cell + under + 4
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * wide + 4, rows * high + 4), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (picture, words) in enumerate(zip(pictures, lines)):
        x, y = 4 + k % columns * wide, 4 + k // columns * high
        whole = cell % picture.shape[-1] == 0  # then each pixel becomes a square
        resample = Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC
        sheet.paste(to_pil(picture).resize((cell, cell), resample), (x, y))
        for i, text in enumerate(words):
            pen.text((x, y + cell + 2 + i * line), text, fill="black", font=font)
    return sheet


def check_folder(path, inputs=()):
    """An argument's type, a Path: a picture, if its name ends like one, else a folder to fill.
    UserError now, and not after the work, if it is one of `inputs` or cannot be written."""
    path = Path(path)
    picture = path.suffix.lower() in SUFFIXES
    there = path.absolute().parent if picture else path.absolute()
    while not there.exists():
        there = there.parent
    if picture and path.is_dir() or not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"cannot write into {path}: {there} is no folder you may write to")
    if path.resolve() in [Path(x).resolve() for x in inputs]:
        raise UserError(f"--out {path} would replace a picture that is read; give another name")
    return path


def file_ending(suffix):
    """An argument's type, a Path: a file to write, of the command's own kind and no other."""
    def parse(text):
        if not text.endswith(suffix) or Path(text).is_dir():
            raise UserError(f"{text}: must be a file whose name ends in {suffix}")
        check_folder(Path(text).parent)  # now, not after hours of work
        return Path(text)

    return parse


def save_picture(picture, path, **options):
    """Write a PIL picture under another name beside the Path `path`, then rename it, so neither a
    full disk nor Ctrl-C leaves half a picture behind. Returns the path."""
    beside = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix tells Pillow the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(beside, quality=95, **options)
        os.replace(beside, path)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {path}: {e}") from e
    finally:
        beside.unlink(missing_ok=True)
    return path


def save_film(frames, path, milliseconds):
    """Write PIL pictures as an endless GIF. milliseconds: for every frame, or a list of them."""
    return save_picture(frames[0], path, save_all=True, append_images=frames[1:],
                        duration=milliseconds, loop=0)


class Film:
    """An `on_step` that films a denoising: x_t and the predicted x_0 side by side, 4x enlarged."""

    def __init__(self):
        self.frames = []

    def __call__(self, k, t, x_t, pred_x_0):
        both = to_pil(torch.cat([x_t[0], pred_x_0[0]], dim=2))  # (3, H, 2W)
        self.frames.append(ImageOps.scale(both, 4, Image.Resampling.NEAREST))

    def save(self, path):
        return save_film(self.frames, path, [80] * (len(self.frames) - 1) + [1500])  # rests at last
