"""The laboratory of findings.py and probing.py: weights, scenes, pictures, results.

Everything is a comparison: two systems draw the same captions from the same seeds, so that what
differs between their pictures is the thing in question.

n: number of scenes; D: size of a CLIP embedding; S = 64: side at which pictures are judged.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lab.judge import scores
from lab.measures import (
    bootstrap, draw_batches, frechet, in_batches, judged_pipeline, mixed_captions, pictures_of,
    scenes_of, share_interval,
)
from support.checkpoint import examples_seen, load_checkpoint
from support.shapes import Shapes, parse_caption
from support.sheets import draw_grid


VERDICTS = {None: "not measured here", -1: "not reproduced", 1: "reproduced",
            0: "can't be decided at this scale"}


@dataclass
class Result:
    """What a finding found."""

    header: list
    table: list = field(default_factory=list)  # rows of cells
    claims: list = field(default_factory=list)  # (sentence, (difference, low, high))
    note: str = ""  # what to know when reading the table
    lacks: str = ""  # added to the verdict where weights are missing or not comparable
    picture: Image.Image | None = None

    def claim(self, sentence, statistic, *rows, unit=1, **settings):
        """Claim that a difference is above zero. unit=100 turns shares into percentage points."""
        interval = bootstrap(statistic, *rows, **settings)
        self.claims.append((sentence, tuple(unit * x for x in interval)))

    @property
    def verdict(self):
        """Reproduced if every interval lies above zero, not reproduced if one lies below. One
        without width decides nothing: too few scenes, which all gave the same answer."""
        sides = [(low > 0) - (high < 0) if low < high else 0 for _, (_, low, high) in self.claims]
        return ", ".join(filter(None, (VERDICTS[min(sides, default=None)], self.lacks)))


def percent(interval):
    """A share with its interval, cut at 0% and 100%."""
    if not math.isfinite(interval[0]):
        return "-"  # nothing was asked
    estimate, low, high = (100 * min(1, max(0, x)) for x in interval)
    return f"{estimate:.1f}% ({low:.1f} to {high:.1f})"


def share(values):
    """The share of ones among zeros and ones (n,), NaNs left out, with Wilson's interval."""
    n = int((~np.isnan(values)).sum())
    return f"{percent(share_interval(values))} of {n}" if n else "-"


def number(interval, digits=2):
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*interval, d=digits)


def frechet_cell(drawn, true):
    """A Frechet distance with its interval; where the correction for bias goes below 0, it is 0."""
    figures = bootstrap(frechet, drawn, true, biased=True, times=400)
    return number([max(0.0, x) for x in figures], 1)


def farther(a, b, true):
    """How much farther from the true embeddings a is than b (an argument of Result.claim)."""
    return frechet(a, true) - frechet(b, true)


def right(pictures, captions, column="binding"):
    """For each picture: 1 right, 0 wrong, NaN where its caption does not say (judge.score)."""
    found = scores(pictures, map(parse_caption, captions))
    return np.array([result[column] for result in found], float)  # None becomes NaN


def sheet(sets, captions=None):
    """The first six pictures of several sets {name: pictures}, a set a row, names and captions
    below."""
    count = min(6, *map(len, sets.values()))
    labels = [f"{name}: {captions[k]}" if captions else name for name in sets for k in range(count)]
    pictures = torch.cat([pictures[:count] for pictures in sets.values()])
    return draw_grid(pictures, labels, columns=count, cell=128)


class Lab:
    """Trained stages, validation scenes, and every picture drawn so far."""

    def __init__(self, args):
        self.folder, self.device = Path(args.weights), args.device
        self.n, self.seed = args.n, args.seed
        data, self.drawn = Shapes(self.n, "val", self.seed), {}
        self.scenes, self.captions = scenes_of(data), mixed_captions(data)
        # Loaded once for each decoder and prior.
        self.pipeline = cache(lambda decoder="decoder", prior="prior": judged_pipeline(
            self.folder, self.device, decoder=decoder, prior=prior))

    @property
    def clip(self):
        return self.pipeline().clip

    def has(self, stage):
        return (self.folder / f"{stage}.pt").exists()

    def true_emb(self, scenes):
        """CLIP's embeddings (n, D) of true pictures."""
        return self.clip_emb(pictures_of(scenes, self.clip.image_size))

    def prior_emb(self, captions, prior="prior"):
        """Embeddings (n, D) that a prior draws for captions."""
        pipeline, seeds = self.pipeline(prior=prior), range(self.seed, self.seed + len(captions))
        return torch.cat([pipeline.embed(pipeline.text(captions[part]), seeds[part]).cpu()
                          for part in in_batches(len(captions), 64)])

    def clip_emb(self, pictures):
        """CLIP's embeddings (n, D) of drawn pictures."""
        return torch.cat([self.clip.encode_image(p.to(self.device)).cpu()
                          for p in pictures.split(50)])

    def draw(self, captions, given="prior", decoder="decoder", prior="prior", scale=2.0, say=True):
        """Pictures (n, 3, S, S), drawn once each by measures.draw_batches with the lab's seeds."""
        name = given if isinstance(given, str) else hash(given.cpu().numpy().tobytes())
        key = tuple(captions), name, decoder, prior, scale, say
        if key not in self.drawn:
            args = Namespace(seed=self.seed, prior_scale=1.0, prior_steps=None, scale=scale,
                             steps=None, candidates=1)  # the paper draws one
            batches = draw_batches(self.pipeline(decoder, prior), captions, args, given, say=say)
            self.drawn[key] = torch.cat([pictures for _, pictures in batches])
        return self.drawn[key]

    def draw_alone(self, emb):
        """Pictures of embeddings (n, D), without captions and guidance."""
        return self.draw(["a shape"] * len(emb), given=emb, scale=1.0, say=False)

    def examples(self, stage):
        """How many examples a stage was trained on, repetitions counted."""
        return examples_seen(load_checkpoint(self.folder / f"{stage}.pt", stage))

    def caveat(self, stage):
        """What a comparison with another decoder has to be read with (fields of a Result)."""
        if not self.has(stage):
            return {"note": f"There is no {stage}: python train.py {stage}.",
                    "lacks": f"without {stage}"}
        ours, theirs = self.examples("decoder"), self.examples(stage)
        if ours == theirs:
            return {}
        return {"note": f"The decoder was trained on {ours:,} pictures, {stage} on {theirs:,}.",
                "lacks": "after unequal trainings"}

    def systems(self):
        """What F4, F5, F8 and F9 compare, {name: settings of draw}: unCLIP and GLIDE, a decoder
        trained on captions alone. Without that one, unCLIP's own decoder with the caption alone
        takes its place: a case that made up 5% of its training."""
        if self.has("decoder_caption"):
            return {"unCLIP": {}, "GLIDE": {"given": "caption", "decoder": "decoder_caption"}}
        return {"unCLIP": {}, "unCLIP without embedding": {"given": "caption"}}

    @property
    def rival(self):
        return list(self.systems())[1]
