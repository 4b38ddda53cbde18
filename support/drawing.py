"""What the drawing commands share: options, where they look for weights, the files they write."""

import re
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from support.pictures import fit, open_picture
from support.sheets import (
    SUFFIXES, check_folder, draw_grid, save_film, save_picture, to_pil, to_tensor,
)
from support.tools import UserError, choose_device, positive, seed_number

SHIPPED = Path(__file__).parent.parent / "weights/shapes"  # drawn with if no others are named


def drawing_options(parser):
    """Add the options that every drawing command has; returns the parser's add_argument."""
    add = parser.add_argument
    add("--weights", help="folder of checkpoints (default: weights/shapes)")
    add("--size", type=positive, default=64, help="side of the pictures: 64, 256 or 1024")
    add("--seed", type=seed_number, default=0, help="of the first picture; the next has one more")
    add("--out", type=check_folder, default="samples", help="folder, or the sheet: NAME.png, ...")
    add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    add("--clip", help="MODEL:TAG=FILE, to read the CLIP of the training from a file")
    return add


def reachable_size(pipeline, size):
    """The largest side up to `size` that the trained stages can draw; says so if it is smaller."""
    side = max((s for s in pipeline.sizes if s <= size), default=None)
    if side is None:
        raise UserError(f"--size {size}: {pipeline.folder} draws {pipeline.sizes[0]} or more")
    if side < size:
        print(f"{pipeline.folder}: no upsampler to {size} pixels is loaded, stopping at {side}")
    return side


def slugs(captions):
    """Captions as file names: their words, cut at 60 bytes, numbered where two are the same."""
    names, code = [], sys.getfilesystemencoding()
    for caption in captions:
        words = "-".join(re.findall(r"[^\W_]+", caption.lower()))
        name = words.encode(code, "ignore")[:60].decode(code, "ignore") or "caption"
        numbers = ("", *(f"-{n}" for n in range(2, len(captions) + 1)))
        names.append(next(name + n for n in numbers if name + n not in names))
    return names


def sheet_path(out, words, inputs=()):
    """The sheet's Path: `out`, if that is a picture's name, else one in that folder, named after
    `words`. Both it and the film beside it can be written, see check_folder."""
    path = out if out.suffix.lower() in SUFFIXES else out / f"{'_'.join(slugs(words))}.png"
    if path.suffix.lower() == ".gif":
        raise UserError(f"--out {out}: films are .gif; call the sheet .png or .jpg")
    for file in (path, path.with_suffix(".gif")):
        check_folder(file, inputs)
    return path


def write_drawings(pipeline, args):
    """sample.py's files: a PNG for each picture, a grid of all, and with --film a GIF for each."""
    pipeline.text(args.caption)  # refuses an empty one before the work
    size, names = reachable_size(pipeline, args.size), slugs(args.caption)
    grid = sheet_path(args.out, ["grid", names[0], str(args.seed)])
    jobs = {grid.parent / f"{name}_{seed}.png": (caption, seed)
            for caption, name in zip(args.caption, names)
            for seed in range(args.seed, args.seed + args.n)}
    if grid in [sheet_path(path, []) for path in jobs]:
        raise UserError(f"--out {grid}: one of the pictures has this name; choose another")
    shown, labels, films = [], [], [] if args.film else None
    for path, (caption, seed) in tqdm(jobs.items(), "pictures", disable=None):
        drawn = pipeline.draw(caption, [seed], size, args.scale, args.steps, args.prior_scale,
                              args.prior_steps, args.candidates, args.stages, films)
        print(save_picture(drawn[-1], path))
        if films:
            print(films.pop().save(path.with_suffix(".gif")))
        shown += map(to_tensor, drawn)
        labels += [f"{caption}, {p.width} px" if args.stages else caption for p in drawn]
    layout = [args.n if args.n > 1 else 4]
    if args.stages:  # a row is one picture at each of its sizes, drawn equally large
        layout = len(pipeline.sizes), min(512, max(128, size))
    print(save_picture(draw_grid(shown, labels, *layout), grid))


def read(pipeline, path):
    """A file -> its middle square at the decoder's size (1, 3, H, W), and its image_emb (1, D)."""
    picture = open_picture(path)
    if picture.width != picture.height:
        print(f"{path}: of {picture.width} x {picture.height} pixels, the middle square is used")
    pixels = to_tensor(fit(picture, pipeline.sizes[0]))[None].to(pipeline.device)
    return pixels, pipeline.look(picture)


def mask_of(pipeline, path, picture):
    """Two files of the same shape -> the mask (1, 1, H, W) at the decoder's size: True is white."""
    mask, (width, height) = open_picture(path), open_picture(picture).size
    if abs(mask.width * height / (mask.height * width) - 1) > 0.01:
        raise UserError(f"{path}: its shape {mask.size} is not the picture's, {width, height}")
    if max(high for _, high in mask.getextrema()) <= 1:  # then 1 is white
        mask = mask.point(lambda level: 255 * level)
    white = to_tensor(fit(mask, pipeline.sizes[0])).amax(dim=0)[None, None] > 0  # any colour
    if not white.any():
        raise UserError(f"{path}: the mask must be white where to draw, and its middle is black")
    print(f"{path}: {white.float().mean():.1%} of the square is light or transparent, to be drawn")
    return white.to(pipeline.device)


def write_strip(pipeline, size, pictures, labels, seed, path, film=False):
    """manipulate.py's files: pictures (n, 3, H, W), enlarged to `size`, side by side as a PNG; with
    film also a GIF that runs from the second to the last but one and back."""
    pictures = torch.cat([pipeline.upsample(p[None], [seed], size).cpu() for p in pictures])
    print(save_picture(draw_grid(pictures, labels, columns=len(pictures)), path))
    if film:
        side = [max(size, 256)] * 2
        frames = [to_pil(p).resize(side, Image.Resampling.BICUBIC) for p in pictures[1:-1]]
        print(save_film(frames + frames[-2:0:-1], path.with_suffix(".gif"), 120))
