"""The laboratory in which findings.py and probing.py work: weights, scenes, pictures, results.

The one idea: compare, do not measure. Pictures of two systems come from the same captions and the
same seeds, so that what differs between them is the thing in question; and each is drawn once,
however many findings look at it.

Letters: n scenes, D CLIP embedding, S = 64, the side at which pictures are judged.
Read next: findings.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import choose_device, draw_grid
from data import Shapes, UserError, parse_caption
from judge import S, judge, score
from measures import bootstrap, frechet_distance, in_batches, look
from sample import Pipeline, default_weights


@dataclass
class Result:
    """What a finding found. claims: (sentence, (difference, low, high)), each should be above 0."""

    header: list
    table: list = field(default_factory=list)  # rows of cells
    claims: list = field(default_factory=list)
    note: str = ""  # what to know when reading it
    picture: Image.Image | None = None

    @property
    def verdict(self):
        if any(high < 0 for _, (_, _, high) in self.claims):
            return "not reproduced"
        if self.claims and all(low > 0 for _, (_, low, _) in self.claims):
            return "reproduced"
        return "can't be decided at this scale"


def percent(interval):
    """Of a share: an interval that reaches beyond 0% or 100% is cut there."""
    estimate, low, high = (100 * min(1, max(0, x)) for x in interval)
    return f"{estimate:.1f}% ({low:.1f} to {high:.1f})"


def number(interval, digits=2):
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*interval, d=digits)


class Lab:
    """Trained stages, validation scenes, and every picture drawn so far: nothing is drawn twice."""

    def __init__(self, args):
        self.folder = Path(args.weights or default_weights())
        self.device, self.n, self.seed = choose_device(args.device), args.n, args.seed
        self.pipelines, self.drawn = {}, {}
        self.data = Shapes(self.n, "val", self.seed)
        # Sparse, middle and full captions in turn.
        self.captions = [self.data.captions(i)[i % 3] for i in range(self.n)]

    def has(self, stage):
        return (self.folder / f"{stage}.pt").exists()

    def pipeline(self, decoder="decoder", prior="prior"):
        key = decoder, prior
        if key not in self.pipelines:
            self.pipelines[key] = Pipeline(self.folder, self.device, S, prior, decoder)
            if self.pipelines[key].sizes[-1] < 48:
                raise UserError(f"{self.folder}: draws {self.pipelines[key].sizes[-1]} pixels, the "
                                "judge needs 48: train upsampler1")
        return self.pipelines[key]

    def true_emb(self, data):
        key = "true", data.fingerprint()
        if key not in self.drawn:
            self.drawn[key] = look(self.pipeline(), data)
        return self.drawn[key]

    def draw(self, captions, given="prior", decoder="decoder", prior="prior", scale=2.0,
             say=True):
        """Captions -> pictures (n, 3, S, S) from seeds 0 .. n - 1 on top of the lab's own.

        given: what stands for the image embedding: "prior", "text_emb", "caption" (nothing), or
        embeddings (n, D). say=False: the decoder does not get the caption.
        """
        name = given if isinstance(given, str) else hash(given.cpu().numpy().tobytes())
        key = tuple(captions), name, decoder, prior, scale, say
        if key in self.drawn:
            return self.drawn[key]
        pipeline, pictures = self.pipeline(decoder, prior), []
        for part in in_batches(len(captions), 20):
            seeds = range(self.seed + part.start, self.seed + part.stop)
            text = pipeline.text(captions[part]) if say or isinstance(given, str) else None
            emb = pipeline.condition(given, text, seeds) if isinstance(given, str) else given[part]
            batch = pipeline.decode(emb, text if say else None, seeds, scale)
            pictures.append(pipeline.upsample(batch, seeds, S).cpu())
        self.drawn[key] = torch.cat(pictures)
        return self.drawn[key]

    def glide(self):
        """draw()'s settings for the paper's rival, and a note where its weights are not there."""
        if self.has("decoder_caption"):
            return {"given": "caption", "decoder": "decoder_caption"}, ""
        return {"given": "caption"}, (
            "GLIDE's weights (train.py decoder --condition caption) are not here: in its place "
            "stands unCLIP's own decoder without an embedding, which saw so 5% of its training.")

    def clip_emb(self, pictures):
        size = self.pipeline().clip.image_size
        return torch.cat([self.pipeline().clip.encode_image(p.to(self.device)).cpu() for p in
                          F.interpolate(pictures, size, mode="area").split(50)])


def right(pictures, captions, column="binding"):
    """Per picture: 1 right, 0 wrong, NaN where its caption does not say (judge.score)."""
    scores = [score(judge(p), parse_caption(c))[column]
              for p, c in zip(pictures, captions, strict=True)]
    return np.array([np.nan if s is None else float(s) for s in scores])


def mean_interval(values):
    return bootstrap(np.nanmean, values)


def frechet(drawn, true):
    """Squared Frechet distance, times 1000, of two sets of embeddings given as arrays."""
    return 1000 * frechet_distance(torch.as_tensor(drawn), torch.as_tensor(true))


def frechet_interval(drawn, true):
    return bootstrap(frechet, drawn.cpu(), true.cpu(), times=100)


def farther(a, b, true):
    """How much farther a is from true than b, with an interval."""
    difference = lambda a, b, true: frechet(a, true) - frechet(b, true)  # noqa: E731
    return bootstrap(difference, a.cpu(), b.cpu(), true.cpu(), times=100)


def sheet(rows, labels, count=6):
    """The first pictures of several sets, a row a set."""
    pictures = torch.cat([row[:count] for row in rows])
    captions = [label for label, row in zip(labels, rows) for _ in row[:count]]
    return draw_grid(pictures, captions, columns=min(count, len(rows[0])), cell=96)
