"""What the drawing commands share: their options, the weights they find, the names of files."""

import itertools
from pathlib import Path

from support.tools import UserError, choose_device, positive, seed_number


def default_weights():
    """weights/shapes if it is there, else the newest folder under runs/ with a decoder in it."""
    shipped = Path(__file__).parent.parent / "weights/shapes"
    if (shipped / "decoder.pt").exists():
        return shipped
    runs = sorted(Path("runs").glob("*/decoder.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(
            "no weights found: train with 'python train.py all --preset tiny', or give --weights"
        )
    return runs[-1].parent


def drawing_options(parser):
    """Add the options that every drawing command has; returns the parser's add_argument."""
    add = parser.add_argument
    add("--weights", help="folder of checkpoints (default: weights/shapes, else newest run)")
    add("--size", type=positive, default=64, help="side of the pictures: 64, 256 or 1024")
    add("--seed", type=seed_number, default=0, help="of the first picture; the next has one more")
    add("--out", default="samples", help="folder for the pictures")
    add("--device", type=choose_device, default="auto", help="auto, cpu or cuda")
    add("--clip", help="MODEL:TAG=FILE, the CLIP that the stages were trained with, from a file "
        "(default: as in training)")
    return add


def slugs(captions):
    """Captions as file names: their words, cut at 60 letters, numbered where two are the same."""
    names = []
    for caption in captions:
        words = "".join(c if c.isalnum() else " " for c in caption.lower()).split()
        # Also cut at 180 bytes: a file name may have 255, with what is put around it.
        name = "-".join(words)[:60].encode()[:180].decode(errors="ignore") or "caption"
        numbered = (f"{name}-{n}" for n in itertools.count(2))
        names.append(next(x for x in itertools.chain([name], numbered) if x not in names))
    return names
