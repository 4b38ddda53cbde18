"""The laboratory in which findings.py and probing.py work: weights, scenes, pictures, results.

The one idea: compare, do not measure. Pictures of two systems come from the same captions and the
same seeds, so that what differs between them is the thing in question; and each is drawn once,
however many findings look at it.

Letters: n scenes, D CLIP embedding, S = 64, the side at which pictures are judged.
Read next: findings.py.
"""

import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from lab.judge import S, judge, score
from lab.measures import (
    bootstrap, check_side, draw_many, frechet_distance, look, mixed_captions, share_interval,
)
from sample import Pipeline
from support.checkpoint import examples_seen, load_checkpoint
from support.shapes import Shapes, parse_caption
from support.sheets import draw_grid

@dataclass
class Result:
    """What a finding found. claims: (sentence, (difference, low, high)), each should be above 0;
    in the table's units, differences of shares in points."""

    header: list
    table: list = field(default_factory=list)  # rows of cells
    claims: list = field(default_factory=list)
    note: str = ""  # what to know when reading it
    lacks: str = ""  # said after the verdict, where weights are not here or not comparable
    picture: Image.Image | None = None

    @property
    def verdict(self):
        """From the claims alone. An interval without width means that no scene differed from any
        other: too few were looked at to say anything."""
        if not self.claims:
            return "not measured here"
        sides = [(low > 0) - (high < 0) if low < high else 0 for _, (_, low, high) in self.claims]
        if min(sides) < 0:
            return "not reproduced"
        return "reproduced" if min(sides) > 0 else "can't be decided at this scale"


class Rival(NamedTuple):
    """The system that unCLIP is compared with: its name, its settings for Lab.draw(), what to note,
    and what to say after the verdict, both empty where nothing stands in the way."""

    name: str
    settings: dict
    note: str
    lacks: str


def percent(interval):
    """Of a share: an interval that reaches beyond 0% or 100% is cut there."""
    if not math.isfinite(interval[0]):
        return "-"  # nobody said anything about it
    estimate, low, high = (100 * min(1, max(0, x)) for x in interval)
    return f"{estimate:.1f}% ({low:.1f} to {high:.1f})"


def share(values):
    """Of zeros and ones (n,), NaNs left out: "estimate of n (low to high)", Wilson's interval."""
    n = int((~np.isnan(values)).sum())
    return f"{percent(share_interval(values))} of {n}" if n else "-"


def number(interval, digits=2):
    """Of any figure: "estimate (low to high)"."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*interval, d=digits)


def points(interval):
    """The difference of two shares (0 to 1), in percentage points."""
    return tuple(100 * x for x in interval)


class Lab:
    """Trained stages, validation scenes, and every picture drawn so far: none is drawn twice."""

    def __init__(self, args):
        self.folder, self.device = Path(args.weights), args.device
        self.n, self.seed = args.n, args.seed
        self.pipelines, self.drawn = {}, {}
        self.data = Shapes(self.n, "val", self.seed)
        self.captions = mixed_captions(self.data)

    def has(self, stage):
        """Are this stage's weights there?"""
        return (self.folder / f"{stage}.pt").exists()

    def pipeline(self, decoder="decoder", prior="prior"):
        """The trained stages with this decoder and this prior, loaded once."""
        key = decoder, prior
        if key not in self.pipelines:
            self.pipelines[key] = Pipeline(self.folder, self.device, S, prior, decoder)
            check_side(self.pipelines[key])
        return self.pipelines[key]

    def true_emb(self, data):
        """CLIP's embeddings (n, D) of the true pictures of a data set."""
        key = "true", data.fingerprint()
        if key not in self.drawn:
            self.drawn[key] = look(self.pipeline().clip, data)
        return self.drawn[key]

    def draw(self, captions, given="prior", decoder="decoder", prior="prior", scale=2.0,
             say=True):
        """measures.draw_many with this decoder and prior: (n, 3, S, S), seeds from the lab's on."""
        name = given if isinstance(given, str) else hash(given.cpu().numpy().tobytes())
        key = tuple(captions), name, decoder, prior, scale, say
        if key not in self.drawn:
            pipeline = self.pipeline(decoder, prior)
            pictures = draw_many(pipeline, captions, self.seed, given, S, say, scale)
            self.drawn[key] = at_side_S(pictures)
        return self.drawn[key]

    def examples(self, stage):
        """How many examples, counted again each time, a stage has seen in training."""
        return examples_seen(load_checkpoint(self.folder / f"{stage}.pt", stage))

    def unequal(self, stage):
        """Where `stage` has not seen as many pictures as the decoder it is compared with: (what to
        note, what to say after the verdict); else two empty strings."""
        ours, theirs = self.examples("decoder"), self.examples(stage)
        if ours == theirs:
            return "", ""
        return (f"Not trained equally long: decoder has seen {ours:,} pictures, {stage} "
                f"{theirs:,}.", "after unequal trainings")

    def glide(self):
        """The paper's Rival, or where its weights are not here what stands in its place."""
        if self.has("decoder_caption"):
            settings = {"given": "caption", "decoder": "decoder_caption"}
            return Rival("GLIDE", settings, *self.unequal("decoder_caption"))
        return Rival("unCLIP without embedding", {"given": "caption"}, (
            "GLIDE's weights are not here (train.py decoder --condition caption). In its place "
            "stands unCLIP's own decoder with the caption alone, a case that it met in 5% of its "
            "training: the verdict is about that."), "with a stand-in for GLIDE")

    def clip_emb(self, pictures):
        """CLIP's embeddings (n, D) of drawn pictures."""
        encode = self.pipeline().clip.encode_image
        return torch.cat([encode(p.to(self.device)).cpu() for p in pictures.split(50)])


def at_side_S(pictures):
    """Pictures of any side, as most decoders draw them, at the side of the judge and the sheets."""
    return pictures if pictures.shape[-1] == S else F.interpolate(pictures, S, mode="area")


def right(pictures, captions, column="binding"):
    """Per picture: 1 right, 0 wrong, NaN where its caption does not say (judge.score)."""
    scores = [score(judge(p), parse_caption(c))[column]
              for p, c in zip(pictures, captions, strict=True)]
    return np.array([np.nan if s is None else float(s) for s in scores])


def frechet(drawn, true):
    """Squared Frechet distance, times 1000, of two sets of embeddings given as arrays."""
    return 1000 * frechet_distance(torch.as_tensor(drawn), torch.as_tensor(true))


def frechet_interval(drawn, true):
    """frechet() with its interval. No distance is below 0: what the correction puts there is 0."""
    figures = bootstrap(frechet, drawn.cpu(), true.cpu(), biased=True, times=400)
    return tuple(max(0.0, x) for x in figures)


def farther(a, b, true):
    """How much farther a is from true than b, with an interval."""
    def difference(a, b, true):
        return frechet(a, true) - frechet(b, true)

    return bootstrap(difference, a.cpu(), b.cpu(), true.cpu(), biased=True, times=1000)


CELL = 128  # side of a picture of a sheet, pixels


def sheet(rows, names, captions=()):
    """The first six pictures of several sets: a row a set, its name at the left; their captions
    above the columns."""
    count = min(6, *map(len, rows))
    grid = draw_grid(torch.cat([row[:count] for row in rows]), columns=count, cell=CELL)
    font = ImageFont.load_default(13)
    heads = [textwrap.wrap(caption, 19) for caption in captions[:count]]
    left, top = CELL, 8 + 16 * max(map(len, heads), default=0)
    whole = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    whole.paste(grid, (left, top))
    pen = ImageDraw.Draw(whole)
    for k, lines in enumerate(heads):
        pen.text((left + 4 + k * (CELL + 4), 4), "\n".join(lines), fill="black", font=font)
    for k, name in enumerate(names):
        lines = "\n".join(textwrap.wrap(name, 17))
        pen.text((6, top + 6 + k * (CELL + 4)), lines, fill="black", font=font)
    return whole
