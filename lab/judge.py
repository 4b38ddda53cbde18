"""A judge that sees what a picture shows, so that "does it fit its caption?" has a number.

The paper asks people whether a picture fits its caption (sec. 5.2). Our scenes are simple enough
for geometry to answer: `judge` lists the objects of a picture (colour, shape, size, place) and its
background, `score` compares that with what a caption claims. Nothing is trained, so no network
marks its own homework. The judge itself is judged first, on fresh drawings whose content is known:
`python -m lab.evaluate judge` (99% or better, also with noise and blur).

The one idea: all colours of the world are far from grey, all backgrounds are grey. So *chroma*
(distance from grey) finds the objects, hue names their colours, and each silhouette, brought to a
standard place and area, is compared with drawings of every shape at every angle.

Letters: S = 64, the side at which pictures are judged; G = 24, the side of a standard silhouette.
Places and radii are parts of the picture's side; y grows downwards.
Read next: evaluate.py, which puts it to work.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageFilter

from support.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, render
from support.sheets import to_tensor
from support.tools import UserError

S = 64
LEAST = 48  # pixels a side: of smaller pictures shapes can't be told
G = 24
SPECK = 40  # pixels of S x S: a smaller patch is no object; the smallest star has 90

# ------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True)
class Seen:
    """What a picture shows. Its things have colour, shape, size, x, y, radius, angle and rgb."""

    background: str | None  # None: neither black nor white nor gray
    things: tuple


def judge(image):
    """Look at a picture -> Seen.

    image: PIL image, or a tensor (3, H, W) in [-1, 1]; square, 48 pixels or more a side
    """
    pixels = at_judging_size(image)  # (S, S, 3) in [0, 1]
    turned = pixels.swapaxes(0, 1)
    border = np.concatenate([pixels[:2], pixels[-2:], turned[:2], turned[-2:]])
    ground = np.median(border.reshape(-1, 3), axis=0)
    # Objects are found in a smoothed picture, where noise makes no specks and no wrong hues.
    calm = smooth(pixels)
    patches = connected(name_colours(calm, ground))
    taken = np.any([mask for _, mask in patches], axis=0) if patches else np.zeros((S, S), bool)
    things = [measure(pixels, ground, index, mask, taken) for index, mask in patches]
    return Seen(name_background(ground), tuple(things + find_sign(calm, ground, taken)))


def at_judging_size(image):
    """A picture of LEAST pixels or more -> (S, S, 3) float in [0, 1]: large ones averaged, those
    below S enlarged."""
    x = to_tensor(image.convert("RGB")) if isinstance(image, Image.Image) else image
    x = x.detach().float().cpu()
    if x.dim() != 3 or x.shape[0] != 3 or x.shape[1] != x.shape[2] or x.shape[1] < LEAST:
        raise UserError(f"picture of shape {tuple(x.shape)}: the judge needs (3, H, H), "
                        f"H >= {LEAST}")
    if x.shape[1] != S:
        how = dict(mode="area") if x.shape[1] > S else dict(mode="bilinear", align_corners=False)
        x = F.interpolate(x[None], size=(S, S), **how)[0]
    return ((x + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def smooth(pixels):
    """Weights 1 2 1 down, then across: noise shrinks to 3/8 of its standard deviation."""
    for axis in (0, 1):
        padded = np.pad(pixels, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, here, after = (np.take(padded, range(k, k + S), axis) for k in range(3))
        pixels = (before + 2 * here + after) / 4
    return pixels


def hue_plane(rgb):
    """(..., 3) -> (..., 2): grey is the origin, the angle is the hue, the length the chroma."""
    r, g, b = np.moveaxis(np.asarray(rgb, dtype=np.float32), -1, 0)
    return np.stack([r - (g + b) / 2, (g - b) * math.sqrt(3) / 2], axis=-1)


PURE = hue_plane(np.array(list(COLOURS.values())) / 255)  # (6, 2)
CHROMA = np.linalg.norm(PURE, axis=-1)  # (6,)


def name_colours(pixels, ground):
    """(S, S, 3) -> (S, S): the index in COLOURS with the nearest hue, -1 where grey or ground."""
    plane = hue_plane(pixels)
    index = (plane @ (PURE / CHROMA[:, None]).T).argmax(-1)  # nearest angle = largest cosine
    # Half covered by an object, a pixel has half of its chroma: the outline is where that happens.
    # 0.85: the darkest shade.
    coloured = np.linalg.norm(plane, axis=-1) > 0.5 * 0.85 * CHROMA[index]
    return np.where(coloured & (np.abs(pixels - ground).max(-1) > 0.1), index, -1)


def name_background(ground):
    """(3,) -> "black", "gray", "white", or None if it has a colour."""
    if np.ptp(ground) > 0.2:
        return None
    return min(BACKGROUNDS, key=lambda name: abs(255 * ground.mean() - BACKGROUNDS[name]))


def connected(index):
    """Patches of equal index >= 0, joined along edges -> list of (index, (S, S) mask)."""
    width = S + 2  # with a frame of -1, no pixel lacks a neighbour
    todo = np.pad(index, 1, constant_values=-1).ravel()
    starts, todo, patches = np.flatnonzero(todo >= 0).tolist(), todo.tolist(), []
    for start in starts:
        value = todo[start]
        if value < 0:
            continue  # part of an earlier patch
        patch, todo[start] = [start], -1
        for here in patch:  # grows while we walk along it
            for there in (here - 1, here + 1, here - width, here + width):
                if todo[there] == value:
                    todo[there] = -1
                    patch.append(there)
        if len(patch) >= SPECK:
            mask = np.zeros(width * width, dtype=bool)
            mask[patch] = True
            patches.append((value, mask.reshape(width, width)[1:-1, 1:-1]))
    return patches


def grow(mask, n):
    """Widen an (S, S) mask by n pixels in all directions."""
    for _ in range(2):  # down, then (transposed) across
        padded = np.pad(mask, ((n, n), (0, 0)))
        mask = np.any([padded[k : k + S] for k in range(2 * n + 1)], axis=0).T
    return mask


def measure(pixels, ground, index, mask, taken):
    """A patch -> Thing: its colour by hue, its shape and radius by its silhouette.

    mask: (S, S) its pixels; taken: (S, S) those of all patches
    """
    core = ~grow(~mask, 1)  # away from the mixed colours of the edge
    ink = np.median(pixels[core if core.sum() >= 9 else mask], axis=0)
    # How much of each pixel is covered: 0 shows the ground's colour, 1 the object's. Only near the
    # patch, and not near another one.
    cover = (pixels - ground) @ (ink - ground) / max(1e-3, np.sum((ink - ground) ** 2))
    near = grow(mask, 2) & (~grow(taken & ~mask, 1) | mask)
    silhouette, area, x, y = standard(np.clip(cover, 0, 1) * near)
    views, shapes, angles, radii = templates()
    likeness = views @ silhouette  # cosines; 0.96 or more for a drawing, even a noisy one
    best = int(likeness.argmax())
    shape = shapes[best] if likeness[best] > 0.9 else None  # None: a blob
    radius = radii[best] * math.sqrt(area)
    size = "small" if radius < 0.18 else "large"  # SIZES: small to 0.16, large from 0.20
    rgb = tuple(round(255 * float(channel)) for channel in ink)
    return Thing(list(COLOURS)[index], shape, size, x, y, radius, angles[best], rgb)


def standard(cover):
    """A silhouette at a standard place and scale -> ((G * G,) of mean 0 and norm 1, area, x, y).

    cover: (S, S) in [0, 1]. The centre of mass goes to the middle; the area becomes that of a
    circle with a radius of G / 3.2 pixels, so that the tips of a star just fit.
    """
    area = max(1.0, cover.sum())
    middle = np.arange(S) + 0.5
    x, y = cover.sum(0) @ middle / area, cover.sum(1) @ middle / area
    zoom = 3.2 / G * math.sqrt(area / math.pi)  # picture pixels per silhouette pixel
    window = (zoom, 0, x - zoom * G / 2, 0, zoom, y - zoom * G / 2)
    picture = Image.fromarray(cover.astype(np.float32))
    view = picture.transform((G, G), Image.Transform.AFFINE, window, Image.Resampling.BILINEAR)
    view = np.asarray(view).ravel() - np.mean(view)
    return view / (np.linalg.norm(view) + 1e-6), area, x / S, y / S


@lru_cache
def templates():
    """Every shape, angle, size and blur -> views (n, G * G), shapes, angles, radius / sqrt(area).

    Of angles that look the same the smallest is named: within +- half of the shape's symmetry.
    """
    views, shapes, angles, radii = [], [], [], []
    symmetry = {"circle": 5, "square": 90, "triangle": 120, "star": 72, "cross": 90}  # degrees
    for shape in SHAPES:
        for degrees in range(0, symmetry[shape], 5):
            for radius, blur in product((0.145, 0.22), (0, 1.2)):
                angle = math.radians(degrees)
                thing = Thing(None, shape, None, 0.5, 0.5, radius, angle, rgb=(255, 255, 255))
                drawing = render(Scene((thing,), "black", (0, 0, 0)), S).convert("L")
                drawing = drawing.filter(ImageFilter.GaussianBlur(blur))
                view, area, _, _ = standard(np.asarray(drawing) / 255)
                views.append(view)
                shapes.append(shape)
                half = symmetry[shape] / 2
                angles.append(math.radians((degrees + half) % symmetry[shape] - half))
                radii.append(radius / math.sqrt(area))
    return np.stack(views), shapes, angles, radii


def find_sign(pixels, ground, taken):
    """A wide patch without colour that stands out from the ground is a sign -> [Thing] or []."""
    differs = (np.abs(pixels - ground).max(-1) > 0.2) & ~grow(taken, 3)
    for _, mask in connected(np.where(differs, 0, -1)):
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if width > 0.4 * S and 0.15 * S < height < width:
            x, y = (columns.mean() + 0.5) / S, (rows.mean() + 0.5) / S
            return [Thing(shape="sign", x=x, y=y, radius=width / (2 * 0.92 * S))]
    return []


# --------------------------------------------------------------------------------------- scoring

COLUMNS = ("objects", "colours", "shapes", "binding", "sizes", "relation", "background", "all")


def score(seen, claim):
    """Compare a picture with a caption -> {column: True, False, or None where it says nothing}.

    objects      as many as claimed
    colours      each colour mentioned is there, as often as mentioned; shapes, sizes: likewise
    binding      the colours are on the right shapes: every claimed object has its own seen object
                 with all of its mentioned colour and shape
    relation     and these two objects are placed as claimed
    all          all of it at once, sizes on the right objects too

    Not compared: the word on a sign. Any sign will do (probing.read_word reads them).
    """

    def present(part):
        said = Counter(getattr(thing, part) for thing in claim.things)
        del said[None]
        there = Counter(getattr(thing, part) for thing in seen.things)
        return said <= there if said else None

    bound = matches(seen, claim, ("colour", "shape"))
    result = {
        "objects": len(seen.things) == len(claim.things),
        "colours": present("colour"),
        "shapes": present("shape"),
        "binding": len(bound) > 0 if any(t.colour and t.shape for t in claim.things) else None,
        "sizes": present("size"),
        "relation": any(holds(claim.relation, *pair) for pair in bound) if claim.relation else None,
        "background": seen.background == claim.background if claim.background else None,
    }
    exact = matches(seen, claim, ("colour", "shape", "size"))
    if claim.relation:
        exact = [pair for pair in exact if holds(claim.relation, *pair)]
    result["all"] = len(exact) > 0 and all(right is not False for right in result.values())
    return result


def matches(seen, claim, parts):
    """All ways to give each claimed thing its own seen thing that agrees in these parts."""

    def agree(said, there):
        return all(getattr(said, p) in (None, getattr(there, p)) for p in parts)

    ways = permutations(seen.things[:8], len(claim.things))
    return [way for way in ways if all(map(agree, claim.things, way))]


def holds(relation, a, b):
    """Is a above, below, left of or right of b? They must differ most along that axis."""
    right, down = b.x - a.x, b.y - a.y
    ahead = {"above": down, "below": -down, "left of": right, "right of": -right}[relation]
    return ahead >= max(abs(right), abs(down))


def shares(results):
    """List of scores -> {column: share of True among the captions that mention it}, and n."""
    table = {"n": len(results)}
    for column in COLUMNS:
        said = [result[column] for result in results if result[column] is not None]
        table[column] = sum(said) / len(said) if said else None
    return table
