"""Which pictures a folder holds, and their captions: from text files, a table, or COCO's JSON."""

import csv
import glob
import json
import os
import re
from pathlib import Path
from unicodedata import normalize

from PIL import Image
from tqdm import tqdm

from support.tools import UserError

# Only these are opened: Pillow hands EPS, for one, to a program that runs it.
KINDS = {"PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000"}
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in KINDS}
UNOPENED = {*Image.registered_extensions(), ".heic", ".heif"} - SUFFIXES
FORMATS = sorted(KINDS & Image.OPEN.keys())
LATER = {"delay": 3, "leave": False, "disable": None}  # a progress line after three seconds
EXAMPLES = {"metadata.jsonl": '{"file_name": "a.png", "text": "a caption"}',
            "metadata.csv": 'file_name,text in its first line, then a.png,"a caption, say"'}


def find_files(root):
    """{path in Unicode's composed form: Path on the disk} of what is in root, in linked folders
    too; names with a dot in front, as a Mac's ._a.txt, are left out."""
    found = glob.iglob(f"{glob.escape(str(root))}/**", recursive=True)
    return {normalize("NFC", path): Path(path) for path in found}


def on_disk(root, name, files):
    """The path of what a table calls `name`, as it is on the disk: é has two forms in Unicode."""
    path = os.path.normpath(os.path.join(root, name))
    return files.get(normalize("NFC", path)) or Path(path)


def lines_of(path):
    """The lines of a text in UTF-8, or in UTF-16 with its mark. Not by splitlines(), which splits
    at marks that a caption may hold."""
    if not os.path.isfile(path):  # a pipe may wait for ever
        raise UserError(f"no file at {path}: check the path")
    content = Path(path).read_bytes()
    code = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return re.split("\r?\n", content.decode(code))
    except ValueError:
        raise UserError(f"{path}: its text is not UTF-8; save it as UTF-8")


def captions_of(path):
    """The lines of a text file that are not empty."""
    return [line.strip() for line in lines_of(path) if line.strip()]


def rows_of(table):
    """(line number, the line as it is or a dict) of metadata.jsonl or metadata.csv."""
    lines = lines_of(table)
    if table.suffix == ".jsonl":
        return [row for row in enumerate(lines, start=1) if row[1].strip()]
    rows = csv.DictReader((line + "\n" for line in lines), strict=True)
    try:
        return [(rows.line_num, row) for row in rows]
    except csv.Error as e:
        raise UserError(f"{table}, line {rows.line_num}: {e}; check its quotation marks")


def load_folder(root, files):
    """(files, {path: [captions]}, True: not split yet) from metadata.jsonl or metadata.csv, where a
    row names a picture and its caption (in .jsonl, or a list of them), or from a .txt beside each
    picture, where each line is a caption."""
    captioned = {}
    table = next((root / name for name in EXAMPLES if (root / name).is_file()), None)
    for number, row in rows_of(table) if table else ():
        try:
            row = json.loads(row) if isinstance(row, str) else row
            name, text = row["file_name"], row["text"]
            if None in row:  # a comma in a caption, without quotation marks around it
                raise ValueError
            texts = [text] if isinstance(text, str) else [] + text  # fails unless it is a list
            texts = [t.strip() for t in texts if t.strip()]
            captioned.setdefault(on_disk(root, name, files), []).extend(texts)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{table}, line {number}: {str(row)[:60]!r} must be like "
                            f"{EXAMPLES[table.name]}")
    for key, path in () if table else tqdm(files.items(), "captions", **LATER):
        beside = files.get(os.path.splitext(key)[0] + ".txt")
        if path.suffix.lower() in SUFFIXES and beside and beside.is_file():
            captioned[path] = captions_of(beside)
    if not any(captioned.values()):
        below = [path.parent for path in files.values() if path.name in EXAMPLES]
        raise UserError(f"{root}: no captions; add metadata.jsonl with lines like "
                        f"{EXAMPLES['metadata.jsonl']}, or a.txt beside each a.png"
                        + (f"; or give --root {min(below)}" if below and not table else ""))
    return files, captioned, True


def load_coco(root, files, split):
    """(the files in its folder, {path: [captions]}, whether they are not split yet) from COCO's
    captions_{split}2017.json or 2014's; or, not split yet, from captions_all.json or the only
    captions_*.json."""
    tables = {path.name: path for path in files.values() if path.match("captions_*.json")}
    own = [name for name in tables if re.fullmatch(r"captions_(train|val)20(14|17)\.json", name)]
    part = split + max((name[-9:-5] for name in own), default="2017")  # one year for both splits
    divide = "captions_all.json" in tables or len(tables) == 1 and not own
    name = min(tables, key="captions_all.json".__ne__) if divide else f"captions_{part}.json"
    if name not in tables:  # the other split must not leak into this
        raise UserError(f"{root}: no annotations/{name}; add it, or name a single file "
                        f"captions_all.json, to be divided (found {sorted(tables)})")
    try:
        captioned, content = {}, json.loads(tables[name].read_bytes())
        names = {image["id"]: str(Path(image["file_name"])) for image in content["images"]}
        for note in content["annotations"]:
            picture, text = names.get(note["image_id"]), " ".join(note["caption"].split())
            if picture and text:
                captioned.setdefault(picture, []).append(text)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{tables[name]}: {e!r}: not a COCO captions file, which is JSON with "
                        "images (id, file_name) and annotations (image_id, caption); download it "
                        "again")
    # The first picture that is found says in which folder all are; in train2017 before others.
    there = {p.name: os.path.join(os.sep, p.relative_to(root))
             for p in sorted(files.values(), key=lambda p: p.parent.name == part)}
    homes = (there[end][: -len(name)] for name in captioned
             if there.get(end := os.path.basename(name), "").endswith(os.sep + name))
    home = f"{root}{next(homes, os.sep if divide else f'{os.sep}{part}{os.sep}')}"
    near = {form: path for form, path in files.items() if form.startswith(normalize("NFC", home))}
    return near, {on_disk(home, name, files): texts for name, texts in captioned.items()}, divide
