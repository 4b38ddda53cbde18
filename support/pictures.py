"""Captioned pictures from disk: CIFAR-10 and CIFAR-100, COCO, or any folder; and `load_data`.

Every data set has name, __len__, captions(i) -> list of str, fingerprint() -> a str that changes
with the data, and image(i, size, ...) -> float32 (3, size, size) in [-1, 1]. The size is chosen at
each call, so models of all sizes train on one data set. Missing and broken pictures are skipped and
named when the data set is opened, not hours into a training.
"""

import hashlib
import json
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision import datasets

from support.shapes import Shapes, digest, with_article
from support.sheets import to_tensor
from support.tools import UserError

EXAMPLE = '{"file_name": "a.png", "text": "a caption"}'
TEMPLATES = ("a photo of {}", "{}", "a small picture of {}", "a blurry photo of {}")  # for CIFAR
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def to_rgb(picture):
    """Any PIL picture -> upright RGB, transparency on white, 16-bit grey scaled to 8 bits."""
    ImageOps.exif_transpose(picture, in_place=True)  # a phone's photo says how it was held
    if picture.mode.startswith("I"):  # 16-bit grey: 65535 is white, not 255
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def open_picture(path, side=None):
    """A file -> upright PIL RGB picture, or UserError. Big JPEGs are decoded at the smallest of
    1/1, 1/2, 1/4 and 1/8 of their size that still has `side`, if given: much faster."""
    try:
        with Image.open(path) as picture:
            picture.draft(None, side and (side, side))
            return to_rgb(picture)
    except FileNotFoundError:
        raise UserError(f"no picture at {path}: check the path")
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


def picture_files(name, captioned, split, limit, divide):
    """{path: [captions]} -> Pictures. divide: the files are not split yet; keep this split's."""
    paths = sorted(path for path, captions in captioned.items() if captions)
    paths = readable_paths(name, paths, None if divide else limit)
    if divide:  # about 1 of 20 files is val, by a hash of its name: adding files moves no others
        hashes = {path: zlib.crc32(path.name.encode()) for path in paths}
        val = {path for path in paths if hashes[path] % 20 == 0}
        if len(paths) >= 2 and len(val) in (0, len(paths)):  # a few files, all on one side
            val = {min(paths, key=hashes.get)}
        paths = [path for path in paths if (path in val) == (split == "val")]
    if not paths:
        raise UserError(f"{name}, split {split}: none of {len(captioned)} captioned images is "
                        "left; val needs at least 2 that can be read")
    items = [(path, captioned[path]) for path in paths[:limit]]
    files = [(path.name, path.stat().st_size, path.stat().st_mtime) for path, _ in items]
    return Pictures(name, items, [split, files, [captions for _, captions in items]])


def readable_paths(name, paths, limit):
    """At least the first `limit` paths whose pictures can be decoded. Reports the others."""
    fine, skipped = [], []
    with ThreadPoolExecutor() as pool:
        while paths and not (limit and len(fine) >= limit):  # don't open all 100,000 for a few
            for path, ok in zip(paths[:256], pool.map(readable, paths[:256])):
                (fine if ok else skipped).append(path)
            paths = paths[256:]
    if skipped:
        names = ", ".join(path.name for path in skipped[:3]) + (", ..." if skipped[3:] else "")
        print(f"{name}: skipped {len(skipped)} missing or unreadable: {names}", file=sys.stderr)
    return fine


@cache  # train and val ask about the same files
def readable(path):
    try:
        return bool(open_picture(path, 64))
    except UserError:
        return False


def load_folder(root):
    """{path: [captions]} from root/metadata.jsonl, where each line names a picture with a caption
    or a list of them; or from a .txt beside each picture, where each line is a caption."""
    captioned, table = {}, root / "metadata.jsonl"
    if table.is_file():
        for number, line in enumerate(table.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                texts = [text] if isinstance(text, str) else [] + text  # fails unless it is a list
                captioned.setdefault(root / name, []).extend(t.strip() for t in texts if t.strip())
            except (ValueError, KeyError, TypeError, AttributeError):
                start = line[:60].decode(errors="replace")
                raise UserError(f"{table}, line {number}: {start!r} must be JSON like {EXAMPLE}")
    else:
        for path in root.rglob("*"):
            beside = path.with_suffix(".txt")
            if path.suffix.lower() in SUFFIXES and beside.is_file():
                try:
                    texts = beside.read_text(encoding="utf-8-sig").splitlines()
                except ValueError:
                    raise UserError(f"{beside}: its text is not UTF-8; save it as UTF-8")
                captioned[path] = [t.strip() for t in texts if t.strip()]
    if not any(captioned.values()):
        raise UserError(f"{root}: no captions; add metadata.jsonl with lines like {EXAMPLE}, or "
                        "a.txt beside each a.png")
    return captioned


def load_coco(root, split):
    """({path: [captions]}, whether to divide it into train and val), from the official
    annotations/captions_{split}2017.json or from a single captions_*.json, to be divided."""
    table = root / "annotations" / f"captions_{split}2017.json"
    divide = not table.is_file()
    if divide:
        found = [*root.glob("captions_*.json"), *root.glob("*/captions_*.json")]
        if len(found) != 1 or "2017" in found[0].name:  # the other split must not leak into this
            raise UserError(f"{root}: no annotations/{table.name}; add it, or name a single file "
                            f"captions_all.json, to be divided (found {[f.name for f in found]})")
        table = found[0]
    try:
        captioned, content = {}, json.loads(table.read_bytes())
        names = {image["id"]: Path(image["file_name"]) for image in content["images"]}
        for note in content["annotations"]:
            name, text = names.get(note["image_id"]), " ".join(note["caption"].split())
            if name and text:
                captioned.setdefault(name, []).append(text)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{table}: {e!r}: not a COCO captions file, which is JSON with images (id, "
                        "file_name) and annotations (image_id, caption); download it again")
    folders, some = [root / f"{split}2017", root, *sorted(root.glob("*/"))], list(captioned)[:20]
    home = next((f for f in folders if any((f / name).is_file() for name in some)), folders[0])
    return {home / name: texts for name, texts in captioned.items()}, divide


def load_cifar(name, root, split, limit):
    """CIFAR-10 or CIFAR-100, downloaded if need be, with captions made from the class names."""
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        data = kind(str(root), train=split == "train", download=True)  # unless it is there
    except Exception as e:  # no network, a full disk, a broken pickle
        raise UserError(f"{name}: not in {root}, or corrupt, and the download failed ({e!r}); "
                        f"fetch {kind.url} and unpack it there")
    pixels, labels = data.data[:limit], data.targets[:limit]
    classes = [label.replace("_", " ") for label in data.classes]
    captions = [[text.format(with_article(label)) for text in TEMPLATES] for label in classes]
    items = [(picture, captions[label]) for picture, label in zip(pixels, labels)]
    some = hashlib.sha256(pixels[::97].tobytes()).hexdigest()
    return Pictures(name, items, [split, labels, some, [TEMPLATES, classes]])


DATA = ("shapes", "cifar10", "cifar100", "coco", "folder")


def load_data(name, root=None, split="train", limit=None, seed=0):
    """The data set `name`, from the folder root; its first `limit` pictures (shapes: that many)."""
    if name not in DATA:
        raise UserError(f"data {name!r}: use one of {', '.join(DATA)}")
    if name == "shapes":
        return Shapes(limit, split, seed)
    if root is None:
        raise UserError(f"data {name} needs its folder: give --root FOLDER")
    root = Path(root).expanduser()
    if name.startswith("cifar"):
        return load_cifar(name, root, split, limit)
    if not root.is_dir() or not any(root.iterdir()):
        raise UserError(f"{root}: not a folder or empty; give the folder that holds the images")
    captioned, divide = load_coco(root, split) if name == "coco" else (load_folder(root), True)
    return picture_files(name, captioned, split, limit, divide)
