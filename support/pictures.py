"""Captioned pictures on disk: CIFAR, COCO, any folder."""

import hashlib
import json
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.shapes import Shapes, digest, with_article
from support.sheets import to_tensor
from support.tools import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def to_rgb(picture):
    """Any PIL picture -> upright RGB: transparency on white, 16-bit grey scaled to 8."""
    ImageOps.exif_transpose(picture, in_place=True)  # a phone's photo says how it was held
    if picture.mode.startswith("I"):  # 16-bit grey: 65535 is white, not 255
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def fit(picture, size, crop=None, place=0.5, interpolation="bicubic"):
    """PIL RGB -> a square of it at size x size, or a window crop = (top, left, side) of that.

    place: where along the longer side the square is taken; 0.5 is the centre, 0 and 1 the ends.
    interpolation: "bicubic" or "bilinear", as a CLIP wants its pictures.

    The resize is antialiased, and a window is exactly a cut-out: the filter sees beyond its edges.
    """
    top, left, side = crop or (0, 0, size)
    square = min(picture.size)
    x, y = (picture.width - square) * place, (picture.height - square) * place
    zoom = square / size
    box = (x + left * zoom, y + top * zoom, x + (left + side) * zoom, y + (top + side) * zoom)
    return picture.resize((side, side), Image.Resampling[interpolation.upper()], box=box)


class PictureFiles:
    """Captioned image files, opened when asked for: what `coco` and `folder` have in common."""

    def __init__(self, name, captioned, split, limit=None, divide=False):
        """captioned: {path: [captions]}; divide: keep only this split's share of the files."""
        self.name, self.split = name, split
        missing, broken, self.items = [], [], []
        paths = sorted(captioned)
        for start in range(0, len(paths), 256):
            if limit and len(self.items) >= limit and not divide:
                break  # enough: do not open the other 100,000 files
            some = paths[start : start + 256]
            with ThreadPoolExecutor() as pool:  # decoding leaves Python's lock to the others
                for path, fine in zip(some, pool.map(readable, some)):
                    if fine:
                        self.items.append((path, captioned[path]))
                    else:
                        (broken if path.is_file() else missing).append(path.name)
        for kind, names in (("missing", missing), ("unreadable", broken)):
            if names:
                some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                print(f"{name}: skipped {len(names)} {kind} images: {some}", file=sys.stderr)
        self.items = (divided(self.items, split) if divide else self.items)[:limit]
        if not self.items:
            raise UserError(
                f"{name}, split {split}: none of {len(captioned)} captioned images is left; check "
                "that the captions name readable image files (val needs at least 2)"
            )

    def __len__(self):
        return len(self.items)

    def image(self, i, size, crop=None, place=0.5, interpolation="bicubic"):
        """Picture i -> (3, size, size) in [-1, 1], or its window crop = (top, left, side)."""
        path, _ = self.items[i]
        try:
            with Image.open(path) as picture:
                picture.draft(None, (2 * size, 2 * size))  # big JPEGs: decode at 1/2, 1/4 or 1/8
                return to_tensor(fit(to_rgb(picture), size, crop, place, interpolation))
        except Exception as error:  # a broken file can raise nearly anything
            raise UserError(f"image {path}: cannot be decoded ({error}); mend or delete it")

    def captions(self, i):
        return self.items[i][1]

    def fingerprint(self):
        files = [(path.name, path.stat().st_size, path.stat().st_mtime) for path, _ in self.items]
        return digest([self.name, self.split, files, [captions for _, captions in self.items]])


@lru_cache(maxsize=None)
def readable(path):
    """Can every pixel be decoded? Once a file and process; big JPEGs at an eighth of their size."""
    try:
        with Image.open(path) as picture:
            picture.draft(None, (64, 64))
            to_rgb(picture)  # as image() does
            return True
    except Exception:  # empty, cut short, not an image, a decompression bomb, ...
        return False


def divided(items, split):
    """About 1 of 20 files is val, by a hash of its name: adding files moves no others."""
    hashes = [zlib.crc32(path.name.encode()) for path, _ in items]
    in_val = [number % 20 == 0 for number in hashes]
    if len(items) >= 2 and len(set(in_val)) == 1:  # a few files, all on one side: one is val
        in_val = [k == hashes.index(min(hashes)) for k in range(len(items))]
    return [item for item, held in zip(items, in_val) if held == (split == "val")]


EXAMPLE = '{"file_name": "a.png", "text": "a caption"}'


def load_folder(root, split, limit=None):
    """root/metadata.jsonl with {"file_name", "text"} a line, or a .txt beside each image.

    text: a caption or a list of captions; in a .txt each line is a caption.
    """
    captioned, table = {}, root / "metadata.jsonl"
    if table.is_file():
        for number, line in enumerate(table.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                texts = [row["text"]] if isinstance(row["text"], str) else row["text"]
                if not isinstance(texts, list):
                    raise TypeError
                texts = [text.strip() for text in texts if text.strip()]
                captioned.setdefault(root / row["file_name"], []).extend(texts)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                start = line[:60].decode(errors="replace")
                raise UserError(f"{table}, line {number}: {start!r} must be JSON like {EXAMPLE}")
    else:
        for path in root.rglob("*"):
            beside = path.with_suffix(".txt")
            if path.suffix.lower() in SUFFIXES and beside.is_file():
                try:
                    lines = beside.read_text(encoding="utf-8-sig").splitlines()
                except ValueError:
                    raise UserError(f"{beside}: its text is not UTF-8; save it as UTF-8")
                captioned[path] = [line.strip() for line in lines if line.strip()]
    captioned = {path: texts for path, texts in captioned.items() if texts}
    if not captioned:
        lines = f"metadata.jsonl with lines like {EXAMPLE}"
        raise UserError(f"{root}: no captions; add {lines}, or a.txt beside each a.png")
    return PictureFiles("folder", captioned, split, limit, divide=True)


def load_coco(root, split, limit=None):
    """COCO captions: annotations/captions_{split}2017.json and the folder {split}2017.

    Any single captions_*.json under root serves too: it is then divided into train and val.
    """
    table = root / "annotations" / f"captions_{split}2017.json"
    divide = not table.is_file()
    if divide:
        found = [*root.glob("captions_*.json"), *root.glob("*/captions_*.json")]
        # A file that belongs to the other split must not leak into this one.
        if len(found) != 1 or "2017" in found[0].name:
            raise UserError(
                f"{root}: no annotations/{table.name} (found {[f.name for f in found]}); add it, "
                "or rename one file to captions_all.json, to divide it into train and val"
            )
        table = found[0]
    try:
        content = json.loads(table.read_bytes())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        texts = [(names.get(note["image_id"]), note["caption"]) for note in content["annotations"]]
        for value in (*names.values(), *(text for _, text in texts)):
            if not isinstance(value, str):
                raise TypeError(f"{value!r} is not a string")
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{table}, line {line}: not JSON ({error}); download it again")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{table}: {error!r}: a COCO captions file has images (id, file_name) and annotations "
            "(image_id, caption); give such a file"
        )
    folders = [root / f"{split}2017", root, *sorted(p for p in root.iterdir() if p.is_dir())]
    some = list(names.values())[:20]
    home = next((f for f in folders if any((f / name).is_file() for name in some)), folders[0])
    captioned = {}
    for name, text in texts:
        text = " ".join(text.split())
        if name is not None and text:
            captioned.setdefault(home / name, []).append(text)
    return PictureFiles("coco", captioned, split, limit, divide)


class Cifar:
    """CIFAR-10 or CIFAR-100 with captions made from the class names: small, real, everywhere."""

    templates = ("a photo of {}", "{}", "a small picture of {}", "a blurry photo of {}")

    def __init__(self, name, root, split, limit=None):
        try:
            from torchvision import datasets  # imported here: it takes seconds
        except ImportError:
            raise UserError(f"{name} needs torchvision, which is missing: pip install torchvision")
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        folder, archive = root / kind.base_folder, root / kind.filename
        fix = f"delete it, fetch {kind.url} and unpack it in {root}"
        if not folder.exists() and archive.exists():
            if not datasets.utils.check_integrity(str(archive), kind.tgz_md5):
                raise UserError(f"{archive}: not the archive it should be (md5); {fix}")
        try:  # with download=True torchvision only unpacks an archive that is there
            data = kind(str(root), train=split == "train", download=not folder.exists())
        except Exception as error:  # no network, a file missing, a broken pickle
            reason = (str(error) or repr(error)).splitlines()[0].split(" You can")[0]
            raise UserError(f"{name}: {folder} is missing or corrupt ({reason}); {fix}")
        self.name, self.split = name, split
        self.pixels, self.labels = data.data[:limit], data.targets[:limit]
        self.classes = [label.replace("_", " ") for label in data.classes]

    def __len__(self):
        return len(self.labels)

    def image(self, i, size, crop=None, place=0.5, interpolation="bicubic"):
        """Picture i -> (3, size, size) in [-1, 1], or its window crop = (top, left, side)."""
        return to_tensor(fit(Image.fromarray(self.pixels[i]), size, crop, place, interpolation))

    def captions(self, i):
        label = self.classes[self.labels[i]]
        phrase = with_article(label)
        return [template.format(phrase) for template in self.templates]

    def fingerprint(self):
        pixels = hashlib.sha256(self.pixels[::97].tobytes()).hexdigest()
        words = [self.templates, self.classes]
        return digest([self.name, self.split, list(self.labels), pixels, words])


DATA = ("shapes", "cifar10", "cifar100", "coco", "folder")


def load_data(name, root=None, split="train", limit=None, seed=0):
    """Build a data set: shapes, cifar10, cifar100, coco or folder.

    root:  where the files are (not for shapes)
    split: train or val; shapes also has held_out
    limit: keep the first so many images; for shapes how many there are (100,000; val 2,000)
    """
    if name == "shapes":
        n = limit if limit is not None else 100_000 if split == "train" else 2_000
        return Shapes(n, split, seed)
    if name not in DATA:
        raise UserError(f"data {name!r}: use shapes, cifar10, cifar100, coco or folder")
    if split not in ("train", "val"):
        raise UserError(f"split {split!r} of {name}: use train or val")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: a data set needs at least 1 image")
    if root is None:
        raise UserError(f"data {name} needs its folder: give --root FOLDER")
    root = Path(root).expanduser()
    if name.startswith("cifar"):
        return Cifar(name, root, split, limit)
    if not root.is_dir() or not any(root.iterdir()):
        raise UserError(f"{root}: not a folder or empty; give the folder that holds the images")
    return (load_coco if name == "coco" else load_folder)(root, split, limit)
