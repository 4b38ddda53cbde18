"""The default data: a toy world of captioned pictures of coloured shapes and signs, drawn here.

The paper trains on hundreds of millions of captioned photos. This world has their structure in
small: a picture shows more than its caption says, and there are many ways to say it. Each scene is
a pure function of (seed, split, i) whose content is known, so lab/judge.py can measure whether a
picture shows its caption.

The one idea: a caption leaves things out. A detailed one fixes colour, shape, size, relation and
background, a sparse one leaves most of them open, and none mentions the exact place, the rotation
or the shade. Pictures of one caption must differ in what it leaves out (paper sec. 3.1, 5.3).
"""

import hashlib
import json
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from support.sheets import to_tensor
from support.tools import UserError

COLOURS = {"red": (230, 30, 30), "orange": (250, 135, 10), "yellow": (245, 230, 25),
           "green": (30, 170, 60), "blue": (30, 80, 230), "purple": (150, 40, 200)}
BACKGROUNDS = {"black": 14, "white": 241, "gray": 128}  # one grey level each
SIZES = {"small": (0.13, 0.16), "large": (0.20, 0.24)}  # radius, as a part of the picture's side
SHAPES = ("circle", "square", "triangle", "star", "cross")
RELATIONS = ("above", "below", "left of", "right of")
WORDS = ("cat dog sun sky cow bee fox owl hat cup red blue "
         "moon star tree fish bird milk book door rain snow stop open").split()
INK = (25, 25, 30)  # a sign's letters and edge

# Never in train or val; every scene of the split "held_out" shows at least one. Can a model draw a
# green cross after seeing green things and crosses, but no green cross?
HELD_OUT = (("green", "cross"), ("purple", "star"), ("yellow", "triangle"), ("orange", "square"))
TRAIN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    """One object of a picture, or what a caption says about one (None: nothing)."""

    colour: str | None = None  # a key of COLOURS; None for a sign
    shape: str | None = None  # one of SHAPES, or "sign"
    size: str | None = None  # a key of SIZES; None for a sign
    x: float | None = None  # centre, in parts of the side: 0 left, 1 right
    y: float | None = None  # 0 top, 1 bottom
    radius: float | None = None  # of the circle around it, in parts of the side
    angle: float = 0.0  # rotation in radians, never mentioned
    rgb: tuple = (0, 0, 0)  # its shade, never mentioned


@dataclass(frozen=True)
class Scene:
    """What a picture shows, or what a caption claims (None: it leaves this open)."""

    things: tuple  # one or two Things
    background: str | None = None  # a key of BACKGROUNDS
    background_rgb: tuple | None = None
    relation: str | None = None  # things[0] is `relation` things[1]; None with one thing
    word: str | None = None  # what a sign says


def make_scene(rng, held_out=False):
    """Draw a Scene: 42% show one object, 50% two, 8% a sign (held_out: no signs)."""
    background = rng.choice(tuple(BACKGROUNDS))
    grey = (BACKGROUNDS[background] + rng.randint(-14, 14),) * 3
    kind = rng.random() * (0.92 if held_out else 1.0)
    if kind >= 0.92:
        radius = rng.choice((0.34, 0.37, 0.40))
        x, y = rng.uniform(radius, 1 - radius), rng.uniform(0.5 * radius, 1 - 0.5 * radius)
        paper = rng.randint(225, 250)
        sign = Thing(shape="sign", x=x, y=y, radius=radius, rgb=(paper, paper, paper - 10))
        return Scene((sign,), background, grey, word=rng.choice(WORDS))
    pairs = rng.sample(TRAIN_PAIRS, 2)
    if held_out:
        first = rng.choice(HELD_OUT)
        pairs = [first, rng.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) != first])]
        if kind >= 0.42:
            rng.shuffle(pairs)  # a lone object is the first pair, which must be the held-out one
    sizes = [rng.choice(tuple(SIZES)) for _ in pairs]
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    relation = rng.choice(RELATIONS) if kind >= 0.42 else None
    places, things = find_places(rng, radii, relation), []
    for (colour, shape), size, radius, (x, y) in zip(pairs, sizes, radii, places):
        shade, angle = rng.uniform(0.85, 1.0), math.radians(rng.uniform(-20, 20))
        rgb = tuple(round(shade * channel) for channel in COLOURS[colour])
        things.append(Thing(colour, shape, size, x, y, radius, angle, rgb))
    return Scene(tuple(things), background, grey, relation)


def find_places(rng, radii, relation, gap=0.03):
    """Centres (x, y) of one thing inside the picture, or of two that are clearly in this relation:
    at most half as far apart across its axis as along it, or "left of" could be "above"."""
    if relation is None:
        return [[rng.uniform(radii[0], 1 - radii[0]) for _ in range(2)]]
    # On the axis: free space, thing, at least a gap, thing, free space. Large things just fit.
    near, far = (0, 1) if relation in ("above", "left of") else (1, 0)
    cuts = sorted(rng.uniform(0, 1 - 2 * sum(radii) - gap) for _ in range(2))
    along = {near: cuts[0] + radii[near], far: cuts[1] + 2 * radii[near] + gap + radii[far]}
    reach = 0.5 * (along[far] - along[near])
    first = rng.uniform(radii[0], 1 - radii[0])
    second = rng.uniform(max(radii[1], first - reach), min(1 - radii[1], first + reach))
    places = [(along[0], first), (along[1], second)]
    return [(y, x) for x, y in places] if relation in ("above", "below") else places


# --- drawing ---------------------------------------------------------------------------------


def corner(r, degrees):
    """(x, y) at distance r from the centre; 0 degrees points up, and y grows downwards."""
    return r * math.sin(math.radians(degrees)), -r * math.cos(math.radians(degrees))


# Outlines in the unit circle. The star's inner radius and the cross's arms are a little fat, so
# that the two look different even when they are 16 pixels wide.
INNER = math.sqrt(2) * math.sin(math.radians(20))  # where two arms of the cross meet
OUTLINES = {
    "square": [corner(1, 45 + 90 * k) for k in range(4)],
    "triangle": [corner(1, 120 * k) for k in range(3)],
    "star": [corner(0.45 if k % 2 else 1, 36 * k) for k in range(10)],
    "cross": [corner(r, 90 * k + a) for k in range(4) for r, a in ((1, -20), (1, 20), (INNER, 45))],
    "sign": [(-0.92, -0.39), (0.92, -0.39), (0.92, 0.39), (-0.92, 0.39)],
    "panel": [(-0.86, -0.33), (0.86, -0.33), (0.86, 0.33), (-0.86, 0.33)],
}
font = lru_cache(ImageFont.load_default)  # Pillow's own typeface at a height in pixels


def render(scene, size, crop=None):
    """Draw a scene at size x size pixels -> PIL RGB picture, antialiased. crop = (top, left, side):
    only this window, in pixels; the same as cutting it out."""
    top, left, side = crop or (0, 0, size)
    # Antialiasing: draw a black-and-white stencil k times larger, then average k x k boxes.
    k = max(4, 512 // size)
    picture = Image.new("RGB", (side, side), scene.background_rgb)
    for thing in scene.things:
        reach = 1.02 * thing.radius  # the stencil covers the thing's own box, in whole pixels
        x0, y0 = math.floor((thing.x - reach) * size), math.floor((thing.y - reach) * size)
        x1, y1 = math.ceil((thing.x + reach) * size), math.ceil((thing.y + reach) * size)
        if x1 <= left or x0 >= left + side or y1 <= top or y0 >= top + side:
            continue  # outside the window
        sign = ("sign", INK), ("panel", thing.rgb), ("word", INK)  # its edge, paper and letters
        for shape, rgb in sign if thing.shape == "sign" else [(thing.shape, thing.rgb)]:
            stencil = Image.new("L", ((x1 - x0) * k, (y1 - y0) * k), 0)
            fill(ImageDraw.Draw(stencil), shape, thing, scene.word, size * k, x0 * k, y0 * k)
            picture.paste(rgb, (x0 - left, y0 - top), stencil.reduce(k))
    return picture


def fill(draw, shape, thing, word, scale, left, top):
    """Fill a shape with white at the thing's place, size and rotation. In stencil pixels: `scale`,
    the picture's side, and (left, top), the stencil's corner."""
    # Round before shifting to that corner: a thing looks the same wherever its stencil begins.
    x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale
    if shape == "circle":
        draw.ellipse((round(x - r) - left, round(y - r) - top,
                      round(x + r) - 1 - left, round(y + r) - 1 - top), fill=255)
    elif shape == "word":
        draw.text((round(x) - left, round(y) - top), word, 255, font(round(0.62 * r)), anchor="mm")
    else:
        c, s = r * math.cos(thing.angle), r * math.sin(thing.angle)
        corners = [(x + c * u - s * v, y + s * u + c * v) for u, v in OUTLINES[shape]]
        draw.polygon([(math.floor(u) - left, math.floor(v) - top) for u, v in corners], fill=255)


# --- captions --------------------------------------------------------------------------------

# How likely a caption is to mention each part. If not, a shape becomes "shape", a relation "and".
DETAIL = {
    "sparse": dict(size=0.1, colour=0.5, shape=0.88, relation=0.3, background=0.1, word=0.5),
    "middle": dict(size=0.4, colour=0.9, shape=0.88, relation=0.7, background=0.3, word=1.0),
    "full": dict(size=1.0, colour=1.0, shape=1.0, relation=1.0, background=1.0, word=1.0),
}


def with_article(words):
    """ "orange circle" -> "an orange circle". """
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(scene, rng, detail):
    """A caption that mentions every object of the scene. detail: a key of DETAIL."""
    def said(part):
        return rng.random() < DETAIL[detail][part]

    if scene.word:
        text = "a sign" + (f" that says {scene.word}" if said("word") else "")
    else:
        phrases = []
        for thing in scene.things:
            words = [getattr(thing, part) for part in ("size", "colour") if said(part)]
            words.append(thing.shape if said("shape") else "shape")
            phrases.append(with_article(" ".join(words)))
        joint = scene.relation if scene.relation and said("relation") else "and"
        text = f" {joint} ".join(phrases)
    if said("background"):
        text += rng.choice((" on {}", " on a {} background")).format(scene.background)
    return text


THING = rf"an? (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|shape)"
GRAMMAR = re.compile(
    rf"(?:a sign(?: that says (?P<word>[a-z]+))?"
    rf"|{THING}(?: (?P<joint>and|above|below|(?:to the )?(?:left|right) of) {THING})?)"
    rf"(?: on (?:an? )?(?P<ground>{'|'.join(BACKGROUNDS)})(?: background)?)?"
)


def parse_caption(text):
    """The inverse of `describe`: a caption -> what it claims, a Scene with gaps. Understands also
    capitals, extra spaces, a full stop, "grey" and "to the left of"; else raises a UserError."""
    words = " ".join(text.lower().rstrip(" .\n").split()).replace("grey", "gray")
    if not (found := GRAMMAR.fullmatch(words)):
        raise UserError(f"caption {text!r} is outside the shapes grammar: say for example 'a large "
                        "red circle above a small blue square on black' or 'a sign that says cat'")
    things = [Thing(colour or None, None if shape == "shape" else shape, size or None)
              for size, colour, shape in re.findall(THING, words)]
    joint = (found["joint"] or "and").removeprefix("to the ")
    return Scene(tuple(things) or (Thing(shape="sign"),), background=found["ground"],
                 relation=None if joint == "and" else joint, word=found["word"])


@dataclass(frozen=True)
class Shapes:
    """n scenes of a split, always the same for a seed."""

    n: int
    split: str = "train"  # or "val", "test", or "held_out": colour-shape pairs unseen in training
    seed: int = 0
    name, photographs = "shapes", False

    def __len__(self):
        return self.n

    def scene(self, i):
        rng = random.Random(f"scene {self.seed} {self.split} {i}")
        return make_scene(rng, held_out=self.split == "held_out")

    def image(self, i, size, crop=None, place=0.5, interpolation="bicubic"):
        """Picture i -> (3, size, size) in [-1, 1], or its window crop = (top, left, side)."""
        return to_tensor(render(self.scene(i), size, crop))  # drawn at its size: not interpolated

    def captions(self, i):
        """Three captions of picture i: sparse, middle, full."""
        scene, rng = self.scene(i), random.Random(f"captions {self.seed} {self.split} {i}")
        return [describe(scene, rng, detail) for detail in DETAIL]

    def fingerprint(self):
        # 1 is the generator's version: raise it when a seed no longer draws the same scenes.
        return digest([self.name, 1, self.split, self.n, self.seed])


def digest(values):
    """A short hash that changes when the data does: the key of cached embeddings."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
