"""Pictures as tensors, as files and as sheets."""

import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from support.tools import UserError

def to_tensor(picture):
    """PIL RGB image -> float32 (3, H, W) in [-1, 1]: 0 becomes -1, 255 becomes 1."""
    pixels = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


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
