"""Captioned pictures from disk: CIFAR-10 and CIFAR-100, COCO, or any folder; and `load_data`.

Every data set has name, __len__, captions(i) -> list of str, fingerprint() -> a str that changes
with the data, and image(i, size, ...) -> float32 (3, size, size) in [-1, 1]. The size is chosen at
each call, so models of all sizes train on one data set. What is missing or broken is skipped and
named when the data set is opened, not hours into a training.
"""

import hashlib
import os
import sys
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision import datasets
from tqdm import tqdm

from support.captions import (
    FORMATS, LATER, SUFFIXES, UNOPENED, find_files, load_coco, load_folder,
)
from support.shapes import Shapes, digest, with_article
from support.sheets import to_tensor
from support.tools import UserError, say

TEMPLATES = ("a photo of {}", "{}", "a small picture of {}", "a blurry photo of {}")  # for CIFAR
MOST_PIXELS = 2**26  # of a picture; a small file can hold billions, and take gigabytes
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's limit is higher


def to_rgb(picture):
    """A PIL picture -> upright RGB, transparency on white."""
    with suppress(Exception):  # broken EXIF says nothing
        ImageOps.exif_transpose(picture, in_place=True)  # a phone's photo says how it was held
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def open_picture(path, side=None, decode=to_rgb):
    """A file -> decode(it), its upright PIL RGB picture, or UserError. Big JPEGs are decoded at the
    smallest of 1/1, 1/2, 1/4 and 1/8 of their size that still has `side`, if given: much faster."""
    if not os.path.isfile(path):  # nor a folder, or a pipe, which may wait for ever
        raise UserError(f"no picture at {path}: check the path")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.draft(None, side and (side, side))
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} are too many pixels")
            if picture.mode[0] in "IF":  # nothing says which number is white
                raise ValueError("its greys have more than 8 bits")
            return decode(picture)
    except Exception as e:  # a broken file can raise nearly anything
        raise UserError(f"image {path}: not a picture that can be decoded ({e}); replace it")


def fit(picture, size, crop=None, place=0.5, interpolation="bicubic"):
    """PIL RGB -> its square at `place` along the longer side (0.5: the centre, 0 and 1: the ends),
    resized to size x size, antialiased. crop = (top, left, side): only this window of the result,
    as if cut out of it: the filter sees beyond its edges."""
    top, left, side = crop or (0, 0, size)
    square = min(picture.size)
    x, y = (picture.width - square) * place, (picture.height - square) * place
    zoom = square / size
    box = (x + left * zoom, y + top * zoom, x + (left + side) * zoom, y + (top + side) * zoom)
    return picture.resize((side, side), Image.Resampling[interpolation.upper()], box=box)


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures from disk."""

    name: str
    items: list  # (a path or uint8 pixels (H, W, 3), captions)
    content: list  # what the fingerprint is made from
    photographs = True  # they may be cropped and mirrored

    def __len__(self):
        return len(self.items)

    def image(self, i, size, crop=None, place=0.5, interpolation="bicubic"):
        """Picture i -> (3, size, size) in [-1, 1], or its window crop = (top, left, side)."""
        given, _ = self.items[i]
        whole = open_picture(given, 2 * size) if isinstance(given, Path) else Image.fromarray(given)
        return to_tensor(fit(whole, size, crop, place, interpolation))

    def captions(self, i):
        return self.items[i][1]

    def fingerprint(self):
        return digest([self.name, *self.content])


def draw(n, seed):
    """The numbers below n in an order that is always the same for a seed."""
    return np.random.default_rng(seed).permutation(n).tolist()


def picture_files(name, files, captioned, divide, split, limit, seed):
    """Pictures, at most `limit` drawn from a split. files: those that are there. captioned: {path:
    [captions]} of this split, or with `divide` of all."""
    captioned = {path: texts for path, texts in captioned.items() if texts}
    found = {path for path in files.values() if path.suffix.lower() in SUFFIXES}
    others = sorted(p for p in files.values() if p.suffix.lower() in UNOPENED)
    missing = sorted(p for p in captioned.keys() - found if not os.path.isfile(p))
    paths, broken = sorted(captioned.keys() - missing), []
    if divide and len(paths) <= 100:  # so few that all of val could be broken
        paths, broken = whole_files(name, paths, None, seed)
    parts = {split: paths}
    if divide:  # about 1 of 20 files is val, by a hash of its name: adding files moves no others
        hashes = {path: zlib.crc32(path.name.encode(errors="surrogatepass")) for path in paths}
        val = {path for path in paths if hashes[path] % 20 == 0}
        if len(paths) >= 2 and len(val) in (0, len(paths)):  # a few files, all on one side
            val = {min(paths, key=hashes.get)}
        parts = {s: [p for p in paths if (p in val) == (s == "val")] for s in ("train", "val")}
    say(f"{name}: {len(found)} pictures found"
        + some("without a caption", sorted(found - captioned.keys()))
        + some("of a kind that is not opened", others) + some("missing", missing)
        + "".join(f"; {len(p)} {s}" for s, p in parts.items()))
    fine, more = whole_files(name, parts.get(split, paths), limit, seed)
    if broken + more:
        say(f"{name}{some('skipped, broken or too large', broken + more)}", sys.stderr)
    if not fine:
        raise UserError(f"{name}, split {split}: none of {len(captioned)} captioned images is "
                        f"left; {len(missing)} are missing: check --root; val needs at least 2")
    items = [(path, captioned[path]) for path in fine]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime) for path in fine]
    return Pictures(name, items, [split, stats, [captions for _, captions in items]])


def some(what, paths):
    """How many they are, and the first names."""
    names = ", ".join(path.name[:60] for path in paths[:3]) + (", ..." if paths[3:] else "")
    return f"; {len(paths)} {what}: {names}" if paths else ""


def whole_files(name, paths, limit, seed):
    """(`limit` paths drawn from those of whole pictures, or all, and the others that were met)"""
    order, broken = [paths[i] for i in draw(len(paths), seed)], []
    with ThreadPool() as pool:
        looked = zip(order, pool.imap(is_whole, order, chunksize=4))
        whole = (path for path, fine in looked if fine or broken.append(path))
        bar = tqdm(islice(whole, limit), f"{name}: files", limit or len(order), **LATER)
        return sorted(bar), sorted(broken)


@cache
def is_whole(path):
    """Whether a picture can be decoded. Most of them need not be, to know: a PNG has checksums, and
    a JPEG that was cut off lacks its end, FF D9."""
    def check(picture):
        if picture.format == "PNG":
            return picture.verify()
        if picture.format == "JPEG":
            picture.fp.seek(-2, os.SEEK_END)
            if picture.fp.read() == b"\xff\xd9":
                return None
        return to_rgb(picture)

    with suppress(UserError):
        open_picture(path, 64, check)
        return True
    return False


def load_cifar(name, root, split, limit, seed):
    """CIFAR-10 or CIFAR-100, downloaded if need be, with captions made from the class names."""
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        data = kind(str(root), train=split == "train", download=True)  # unless it is there
    except Exception as e:  # no network, a full disk, a broken pickle
        raise UserError(f"{name}: not in {root}, or corrupt, and the download failed ({e!r}); "
                        f"fetch {kind.url} and unpack it there")
    drawn = sorted(draw(len(data), seed)[:limit])
    pixels, labels = data.data[drawn], [data.targets[i] for i in drawn]
    classes = [label.replace("_", " ") for label in data.classes]
    captions = [[text.format(with_article(label)) for text in TEMPLATES] for label in classes]
    items = [(picture, captions[label]) for picture, label in zip(pixels, labels)]
    say(f"{name}: {len(data)} pictures found; {len(items)} {split}")
    some = hashlib.sha256(pixels[::97].tobytes()).hexdigest()
    return Pictures(name, items, [split, labels, some, [TEMPLATES, classes]])


DATA = ("shapes", "cifar10", "cifar100", "coco", "folder")


def load_data(name, root=None, split="train", limit=None, seed=0):
    """The data set `name`, from the folder root; `limit` pictures drawn from its split, the same
    for a seed (shapes: that many). split: "train" or "val"; None is all of a folder."""
    if name not in DATA:
        raise UserError(f"data {name!r}: use one of {', '.join(DATA)}")
    if name == "shapes":
        if root is not None:
            raise UserError(f"shapes are drawn and need no --root: for the pictures in {root} give "
                            "--data folder, coco or cifar10")
        return Shapes(limit, split, seed)
    if root is None:
        raise UserError(f"data {name} needs its folder: give --root FOLDER")
    root = Path(os.path.abspath(Path(root).expanduser()))
    if name.startswith("cifar"):
        return load_cifar(name, root, split, limit, seed)
    if not root.is_dir() or not any(root.iterdir()):
        raise UserError(f"{root}: not a folder or empty; give the folder that holds the images")
    files = find_files(root)
    found = load_coco(root, files, split) if name == "coco" else load_folder(root, files)
    return picture_files(name, *found, split, limit, seed)
