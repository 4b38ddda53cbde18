"""A judge made of geometry: does a picture show what its caption says?

The paper asks people (sec. 5.2). Scenes of shapes are simple enough for geometry: `judge` lists a
picture's objects (colour, shape, size, place) and its background, `score` compares that list with
what a caption claims. Nothing here is trained, so no network marks its own homework, and the judge
itself is measured: `python -m lab.evaluate judge`.

Every colour of this world is far from grey, and every background is grey. So *chroma* (distance
from grey) finds the objects, hue names their colours, and each silhouette, moved and scaled to a
standard view, is compared with drawings of every shape at every angle.

S = 64: side at which pictures are judged. G = 24: side of a standard silhouette. Positions and
radii are fractions of the picture's side; y grows downwards.
"""

import math
from collections import Counter
from functools import lru_cache
from itertools import permutations, product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

from support.shapes import BACKGROUNDS, COLOURS, Scene, Thing, parse_caption, render
from support.sheets import to_tensor

S, G = 64, 24
SPECK = 40  # pixels of S x S: a smaller patch is no object; the smallest star has 90

# --- what does a picture show? ---------------------------------------------------------------


def judge(image):
    """A square picture, PIL or (3, H, H) in [-1, 1] -> the Scene it shows: things of no shape if
    they look like none, no background if it has a colour. Below 48 pixels, shapes blur."""
    pixels = at_judging_size(image)  # (S, S, 3) in [0, 1]
    rim = [0, 1, -2, -1]
    ground = np.median(np.concatenate([pixels[rim], pixels[:, rim].swapaxes(0, 1)]), axis=(0, 1))
    calm = smooth(pixels)  # noise would make specks and wrong hues
    patches = connected(name_colours(calm, ground))
    taken = np.any([mask for _, mask in patches], axis=0) if patches else np.zeros((S, S), bool)
    things = [measure(pixels, ground, index, mask, taken) for index, mask in patches]
    grey = np.ptp(ground) <= 0.2
    nearest = min(BACKGROUNDS, key=lambda name: abs(255 * ground.mean() - BACKGROUNDS[name]))
    return Scene((*things, *find_sign(calm, ground, taken)), nearest if grey else None)


def at_judging_size(image):
    """A picture -> (S, S, 3) float in [0, 1]: larger ones are averaged, smaller ones enlarged."""
    x = to_tensor(image.convert("RGB")) if isinstance(image, Image.Image) else image.float().cpu()
    x = F.interpolate(x[None], S, mode="area" if x.shape[-1] >= S else "bilinear")[0]
    return ((x + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def smooth(pixels):
    """Weights 1 2 1, down and across: noise shrinks to 3/8 of its standard deviation."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    down = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]) / 16


def hue_plane(rgb):
    """(..., 3) -> (..., 2): grey is the origin, the angle is the hue, the length the chroma."""
    r, g, b = np.moveaxis(np.asarray(rgb, dtype=np.float32), -1, 0)
    return np.stack([r - (g + b) / 2, (g - b) * math.sqrt(3) / 2], axis=-1)


def name_colours(pixels, ground):
    """(S, S, 3) -> (S, S): the index in COLOURS with the nearest hue, -1 where grey or ground."""
    pure, plane = hue_plane(np.array(list(COLOURS.values())) / 255), hue_plane(pixels)
    chroma = np.linalg.norm(pure, axis=-1)
    index = (plane @ (pure / chroma[:, None]).T).argmax(-1)  # nearest angle = largest cosine
    # On an outline, half of a pixel is covered: half the chroma. 0.85: the darkest shade.
    coloured = np.linalg.norm(plane, axis=-1) > 0.5 * 0.85 * chroma[index]
    return np.where(coloured & (np.abs(pixels - ground).max(-1) > 0.1), index, -1)


def connected(index):
    """Patches of equal index >= 0, joined along edges: a list of (index, (S, S) mask)."""
    sheet, patches = Image.fromarray((index + 1).astype(np.uint8)).copy(), []  # 0: in no patch
    while (todo := np.array(sheet)).any():
        y, x = divmod(int(np.flatnonzero(todo)[0]), S)
        ImageDraw.floodfill(sheet, (x, y), 0)
        mask = todo != np.array(sheet)
        if mask.sum() >= SPECK:
            patches.append((int(index[y, x]), mask))
    return patches


def grow(mask, n):
    """Widen an (S, S) mask by n pixels in every direction."""
    return F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * n + 1, 1, n)[0].numpy() > 0


def measure(pixels, ground, index, mask, taken):
    """A patch -> Thing. mask, taken: (S, S), the pixels of this patch and of all patches."""
    core = ~grow(~mask, 1)  # away from the mixed colours of the edge
    ink = np.median(pixels[core if core.sum() >= 9 else mask], axis=0)
    # How much of each pixel the object covers: 0 shows the ground's colour, 1 the object's. Only
    # near this patch, and not near another one.
    cover = (pixels - ground) @ (ink - ground) / max(1e-3, np.sum((ink - ground) ** 2))
    near = grow(mask, 2) & (~grow(taken & ~mask, 1) | mask)
    silhouette, area, x, y = standard(np.clip(cover, 0, 1) * near)
    views, described = templates()
    likeness = views @ silhouette  # cosines; at least 0.96 for a drawing, even a noisy one
    shape, angle, relative = described[likeness.argmax()]
    radius = relative * math.sqrt(area)
    return Thing(
        colour=list(COLOURS)[index], shape=shape if likeness.max() > 0.9 else None,  # a blob
        size="small" if radius < 0.18 else "large",  # SIZES: small to 0.16, large from 0.20
        x=x, y=y, radius=radius, angle=angle, rgb=tuple((255 * ink).round().astype(int).tolist()),
    )


def standard(cover):
    """A silhouette in standard position and scale -> ((G * G,) of mean 0 and norm 1, area, x, y).

    cover: (S, S) in [0, 1]. The centre of mass moves to the middle, and the area becomes that of a
    circle with radius G / 3.2 pixels, in which the tips of a star just fit."""
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
    """Every shape, angle, size and blur -> views (n, G * G), [(shape, angle, radius / sqrt(area))].

    A square looks the same every 90 degrees, so angles lie within +- half the shape's symmetry."""
    symmetry = {"circle": 5, "square": 90, "triangle": 120, "star": 72, "cross": 90}  # degrees
    views, described = [], []
    for shape, turn in symmetry.items():
        for degrees, radius, blur in product(range(0, turn, 5), (0.145, 0.22), (0, 1.2)):
            thing = Thing(None, shape, None, 0.5, 0.5, radius, math.radians(degrees), (255,) * 3)
            drawing = render(Scene((thing,), "black", (0, 0, 0)), S).convert("L")
            drawing = drawing.filter(ImageFilter.GaussianBlur(blur))
            view, area, _, _ = standard(np.asarray(drawing) / 255)
            views.append(view)
            angle = math.radians((degrees + turn / 2) % turn - turn / 2)
            described.append((shape, angle, radius / math.sqrt(area)))
    return np.stack(views), described


def find_sign(pixels, ground, taken):
    """A sign is a wide grey patch that stands out from the ground -> [Thing] or []."""
    differs = (np.abs(pixels - ground).max(-1) > 0.2) & ~grow(taken, 3)
    for _, mask in connected(np.where(differs, 0, -1)):
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if width > 0.4 * S and 0.15 * S < height < width:
            x, y = (columns.mean() + 0.5) / S, (rows.mean() + 0.5) / S
            return [Thing(shape="sign", x=x, y=y, radius=width / (2 * 0.92 * S))]
    return []


def the_thing(scene):
    """The one object of a scene, or an empty Thing where there is none, or more than one."""
    return scene.things[0] if len(scene.things) == 1 else Thing()


# --- does it fit a caption? ------------------------------------------------------------------


def score(seen, claim):
    """Compare a picture with a caption -> {column: True, False, or None where it says nothing}.

    objects      there are as many as claimed
    colours      each colour is there, as often as mentioned; shapes and sizes likewise
    binding      every claimed object has its own seen object of the same colour and shape
    relation     and these two objects are placed as claimed
    all          everything at once, with the sizes on the right objects too

    claim: a Scene, with gaps where a caption says nothing (support.shapes.parse_caption).
    The word on a sign is not compared: any sign will do (probing.read_word reads them)."""
    def present(part):
        said = Counter(getattr(thing, part) for thing in claim.things)
        del said[None]
        return said <= Counter(getattr(thing, part) for thing in seen.things) if said else None

    def placed(ways):
        return any(not claim.relation or holds(claim.relation, *way) for way in ways)

    bound = matches(seen, claim, "colour", "shape")
    result = {
        "objects": len(seen.things) == len(claim.things),
        "colours": present("colour"),
        "shapes": present("shape"),
        "binding": len(bound) > 0 if any(t.colour and t.shape for t in claim.things) else None,
        "sizes": present("size"),
        "relation": placed(bound) if claim.relation else None,
        "background": seen.background == claim.background if claim.background else None,
    }
    exact = placed(matches(seen, claim, "colour", "shape", "size"))
    return result | {"all": exact and False not in result.values()}


def matches(seen, claim, *parts):
    """All ways to give each claimed thing its own seen thing that agrees in these parts."""
    return [way for way in permutations(seen.things[:8], len(claim.things))
            if all(getattr(said, part) in (None, getattr(there, part))
                   for said, there in zip(claim.things, way, strict=True) for part in parts)]


def holds(relation, a, b):
    """Is a above, below, left of or right of b? They must differ most along that axis."""
    right, down = b.x - a.x, b.y - a.y
    ahead = {"above": down, "below": -down, "left of": right, "right of": -right}[relation]
    return ahead >= max(abs(right), abs(down))


def scores(pictures, claims):
    """score() of n pictures, each with its own claim, a Scene or a caption: {column: (n,) of 1, 0,
    or NaN where the claim says nothing}."""
    rows = [score(judge(p), parse_caption(claim) if isinstance(claim, str) else claim)
            for p, claim in zip(pictures, claims, strict=True)]
    return {column: np.array([row[column] for row in rows], float) for column in rows[0]}


def shares(columns):
    """The mean of each column, NaNs left out, or None; and n."""
    table = {name: float(np.nanmean(x)) if np.isfinite(x).any() else None
             for name, x in columns.items()}
    return table | {"n": len(columns["all"])}
