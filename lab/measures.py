"""What is measured, whoever asks: many pictures at once, CLIP's space, intervals, a Result, a Lab.

A figure without its uncertainty is a rumour. The bootstrap (Efron 1979) draws the scenes again,
with repetition, from those at hand, and sees how far the figure moves. Rows are paired, one row a
scene: two systems draw the same captions from the same seeds, so whatever makes a scene hard for
both cancels out of their *difference*.

n, m: number of scenes; D: size of a CLIP embedding; S = 64: side at which pictures are judged.
"""

import math
import warnings
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from lab.judge import S, scores
from manipulate import invert, redraw
from sample import Pipeline, noise_for
from stages import load_clip
from support.checkpoint import examples_seen, load_checkpoint
from support.shapes import COLOURS, SHAPES, TRAIN_PAIRS, Shapes, render, with_article
from support.sheets import draw_grid, to_tensor
from support.tools import UserError, autocast

THETAS = (0.0, 0.125, 0.25, 0.375, 0.5)  # how far text diffs turn the embedding
SPLIT = "test"  # scenes that no stage was trained with and nothing was chosen by


def in_batches(n, size=16):
    """range(n) in slices of at most `size`, with a progress bar."""
    return (slice(k, min(k + size, n)) for k in tqdm(range(0, n, size), disable=None))


def judged_pipeline(folder, device, **stages):
    """The trained stages that draw pictures for the judge."""
    pipeline = Pipeline(folder, device, S, **stages)
    if pipeline.sizes[-1] != S:
        raise UserError(f"{folder} draws {pipeline.sizes[-1]} pixels, the judge needs {S}: train "
                        "upsampler1")
    return pipeline


def draw_batches(pipeline, captions, args, given="prior", size=S, say=True):
    """Captions -> batches (slice, pictures (b, 3, size, size)) on the CPU; picture k has the seed
    args.seed + k.

    args: the command line of evaluate.py, or its namesakes. given: the image embedding: "prior",
    "text_emb", "caption" (none), or embeddings (n, D). say: does the decoder get the caption?"""
    for part in in_batches(len(captions)):
        seeds = range(args.seed + part.start, args.seed + part.stop)
        text = pipeline.text(captions[part])
        emb = (pipeline.condition(given, text, seeds, args.prior_scale, args.prior_steps)
               if isinstance(given, str) else given[part].to(pipeline.device))
        drawn, _ = pipeline.decode_best(args.candidates, emb, text if say else None, seeds,
                                        scale=args.scale, steps=args.steps)
        yield part, pipeline.upsample(drawn, seeds, size).cpu()


def look(clip, data):
    """CLIP's embeddings (n, D) of all pictures of a data set."""
    def pictures(part):
        return torch.stack([data.image(i, clip.image_size, interpolation=clip.interpolation)
                            for i in range(part.start, part.stop)]).to(clip.mean.device)

    return torch.cat([clip.encode_image(pictures(part)) for part in in_batches(len(data), 64)])


def redrawn(pipeline, pictures, embs, seeds):
    """Pictures (n, 3, H, W) from their latents: without noise (eta 0) and with it (eta 1)."""
    drawn = []
    for part in in_batches(len(pictures)):
        emb = embs[part].to(pipeline.device)
        x_T = invert(pipeline, pictures[part].to(pipeline.device), emb)
        drawn.append([redraw(pipeline, emb, x_T, seeds[part], eta=eta) for eta in (0.0, 1.0)])
    return [torch.cat(batches) for batches in zip(*drawn, strict=True)]


def scenes_of(data):
    return [data.scene(i) for i in range(len(data))]


def single_objects(data):
    """(i, scene) of the scenes that show one object and no sign."""
    return [(i, s) for i, s in enumerate(scenes_of(data)) if len(s.things) == 1 and not s.word]


def pictures_of(scenes, size):
    """True pictures (n, 3, size, size) of scenes."""
    return torch.stack([to_tensor(render(scene, size)) for scene in scenes])


def mixed_captions(data):
    """One caption for each scene: sparse, middle and full ones in turn."""
    return [data.captions(i)[i % 3] for i in range(len(data))]


def wrong_captions(scene):
    """A two-object scene -> its plain caption, and {what is wrong: a caption with that wrong}, as
    far as training has their pairs of colour and shape: new ones would stand out by that alone."""
    a, b = scene.things
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

    def say(a, b, relation):
        return f" {relation} ".join(with_article(f"{t.colour} {t.shape}") for t in (a, b))

    wrong = {"relation": say(a, b, opposite[scene.relation])}
    # The same words with the colours exchanged: only the binding has changed.
    swapped = replace(a, colour=b.colour), replace(b, colour=a.colour)
    known = all((thing.colour, thing.shape) in TRAIN_PAIRS for thing in swapped)
    if known and a.colour != b.colour and a.shape != b.shape:
        wrong["binding"] = say(*swapped, scene.relation)
    other = next(shape for shape in SHAPES
                 if shape not in (a.shape, b.shape) and (a.colour, shape) in TRAIN_PAIRS)
    wrong["shape"] = say(replace(a, shape=other), b, scene.relation)
    return say(a, b, scene.relation), wrong


def prefers(clip, emb, true, wrong):
    """1 where an embedding (n, D) is closer to its true caption than to its wrong one, else 0; 0.5
    for a tie. true, wrong: n captions each, or one true caption and embedding for all."""
    difference = clip.encode_text(true)[0] - clip.encode_text(wrong)[0]
    gap = (difference.cpu() * emb.cpu()).sum(1).numpy()
    return np.where(np.abs(gap) < 1e-6, 0.5, gap > 0)


def pairs_shown(data):
    """For each scene, 1 at every colour-shape pair that it shows: (n, colours * shapes)."""
    shown = [{(t.colour, t.shape) for t in scene.things} for scene in scenes_of(data)]
    return torch.tensor([[float(pair in pairs) for pair in product(COLOURS, SHAPES)]
                         for pairs in shown])


def linear_probe(emb, labels, rounds=300):
    """Logistic regression from embeddings (n, D) to labels (n, k) of zeros and ones: what lies open
    in the embedding? Returns the fitted function, embeddings (m, D) -> log-odds (m, k)."""
    weight, bias = (torch.zeros(*shape, device=emb.device, requires_grad=True)
                    for shape in ((emb.shape[1], labels.shape[1]), labels.shape[1:]))
    # A convex problem: there is one best fit, wherever the search starts.
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=rounds, line_search_fn="strong_wolfe")

    def log_odds(emb):
        return emb.shape[1] ** 0.5 * emb @ weight + bias

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(log_odds(emb), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return torch.no_grad()(log_odds)


def frechet(a, b):
    """1000 times the squared Frechet distance of the Gaussians that fit a (n, D) and b (m, D), like
    FID (1706.08500). n and m should be several times D, or the covariances are too small.

        |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)
    """
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    cov_a, cov_b = torch.cov(a.T, correction=0), torch.cov(b.T, correction=0)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^1/2
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return 1000 * (means + cov_a.trace() + cov_b.trace() - 2 * mixed).item()


def precision_recall(drawn, true, k=3):
    """Share of drawn points (n, D) among the true ones (m, D), and the reverse (1904.06991): bad
    pictures lower precision, missing variety recall. A point is among others if one of them is no
    farther away than its own k-th nearest neighbour."""
    def radii(points):  # distance to the k-th nearest of the others; the 0th is the point itself
        return torch.cdist(points, points).kthvalue(k + 1, dim=1).values

    distance = torch.cdist(drawn, true)  # (n, m)
    among = distance <= radii(true), distance.T <= radii(drawn)
    return tuple(x.any(dim=1).float().mean().item() for x in among)


def bootstrap(statistic, *rows, biased=False, times=1000, seed=0):
    """A figure and its 95% interval: (estimate, low, high).

    statistic: a function of arrays -> float. rows: its arguments, whose rows i all belong to scene
    i and are resampled together.
    biased: for figures that few scenes make too small (an entropy) or too large (a Frechet
    distance). Resampling repeats scenes and so errs the same way once more; twice the estimate
    minus what the resamples say removes that error (and makes the *basic* interval)."""
    rows, rng = [np.asarray(r) for r in rows], np.random.default_rng(seed)
    n, again = len(rows[0]), []
    with warnings.catch_warnings():  # the mean of nothing is NaN, and such resamples are left out
        warnings.simplefilter("ignore", RuntimeWarning)
        estimate = float(statistic(*rows))
        for _ in range(times):
            picked = rng.integers(n, size=n)
            again.append(float(statistic(*(r[picked] for r in rows))))
        low, high = np.nanquantile(again, (0.025, 0.975)).tolist()
        if biased:
            return 2 * estimate - float(np.nanmean(again)), 2 * estimate - high, 2 * estimate - low
    return estimate, low, high


def share_interval(values):
    """The share of ones (n,), NaNs left out, with Wilson's 95% interval: (share, low, high). Unlike
    the bootstrap's, that does not shrink to a point at 0 or 1."""
    n, z = np.isfinite(values).sum(), 1.959964  # a normal variable is within +- z in 95% of cases
    if n == 0:
        return (math.nan,) * 3
    share = np.nanmean(values)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return share, centre - half, centre + half


def entropy(values):
    """Entropy in nats of the values' frequencies; None means "not seen" and is left out."""
    counts = np.array(list(Counter(v for v in values if v is not None).values()) or [1])
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def number(interval, digits=2):
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*interval, d=digits)


def percent(interval):
    """A share with its interval, cut at 0% and 100%; a dash where nothing was asked."""
    estimate, low, high = (100 * min(1, max(0, x)) for x in interval)
    return "-" if math.isnan(interval[0]) else f"{estimate:.1f}% ({low:.1f} to {high:.1f})"


def share(values):
    """The share of ones among zeros and ones (n,), NaNs left out."""
    n = np.isfinite(values).sum()
    return percent(share_interval(values)) + (f" of {n}" if n else "")


def frechet_cell(drawn, true):
    """A Frechet distance; where the correction for bias goes below 0, it is 0."""
    figures = bootstrap(frechet, drawn, true, biased=True, times=400)
    return number([max(0.0, x) for x in figures], 1)


VERDICTS = {None: "not measured here", -1: "not reproduced", 1: "reproduced",
            0: "can't be decided at this scale"}


@dataclass
class Result:
    """What a finding found."""

    header: list
    table: list = field(default_factory=list)  # rows of cells
    claims: list = field(default_factory=list)  # (sentence, (difference, low, high))
    others: list = field(default_factory=list)  # the claims of further trainings
    note: str = ""  # what to know when reading the table
    lacks: str = ""  # added to the verdict where weights are missing or not comparable
    picture: Image.Image | None = None

    def row(self, *cells):
        self.table.append(cells)

    def claim(self, sentence, statistic, *rows, unit=1, **settings):
        """Claim that a difference is above zero. unit=100 turns shares into percentage points."""
        interval = bootstrap(statistic, *rows, **settings)
        self.claims.append((sentence, tuple(unit * x for x in interval)))

    @property
    def verdict(self):
        """Reproduced if every interval lies above zero, not reproduced if one lies below. One
        without width decides nothing: too few scenes, which all gave the same answer. Nor does a
        difference that has another sign after another training."""
        sides = [(low > 0) - (high < 0) if low < high else 0 for _, (_, low, high) in self.claims]
        for claims in self.others:
            sides = [side if side * x > 0 else 0 for side, (_, (x, *_)) in zip(sides, claims)]
        return ", ".join(filter(None, (VERDICTS[min(sides, default=None)], self.lacks)))


def sheet(sets, captions=None):
    """The first six pictures of several sets {name: pictures}, a set a row."""
    count = min(6, *map(len, sets.values()))
    labels = [f"{name}: {captions[k]}" if captions else name for name in sets for k in range(count)]
    pictures = torch.cat([pictures[:count] for pictures in sets.values()])
    return draw_grid(pictures, labels, columns=count, cell=128)


class Lab:
    """Trained stages, test scenes, and every picture drawn so far. Figures in CLIP's space are
    those of a witness, the CLIP of another run, if there is one: no stage was trained for it."""

    def __init__(self, args, folder, witness=None):
        self.folder, self.device, self.n, self.seed = folder, args.device, args.n, args.seed
        data, self.drawn = Shapes(self.n, SPLIT, self.seed), {}
        self.scenes, self.captions = scenes_of(data), mixed_captions(data)
        loaded = cache(lambda *names: judged_pipeline(
            folder, self.device, **dict(zip(("decoder", "prior"), names))))
        # Each pair is loaded once: cache tells arguments by name from those by position.
        self.pipeline = lambda decoder="decoder", prior="prior": loaded(decoder, prior)
        self.clip = self.pipeline().clip
        self.witness = load_clip(witness, device=self.device) if witness else self.clip

    def has(self, stage):
        return (self.folder / f"{stage}.pt").exists()

    def true_emb(self, scenes):
        """CLIP's embeddings (n, D) of scenes."""
        return self.embed(self.clip, pictures_of(scenes, self.clip.image_size))

    def seen(self, pictures):
        """The witness's embeddings (n, D) of pictures."""
        return self.embed(self.witness, pictures)

    @cached_property
    def goal(self):
        """The witness's embeddings (n, D) of the lab's own scenes."""
        return self.seen(pictures_of(self.scenes, self.witness.image_size))

    def embed(self, clip, pictures):
        return torch.cat([clip.encode_image(p.to(self.device)).cpu() for p in pictures.split(50)])

    def prior_emb(self, captions, prior="prior", **settings):
        """Embeddings (n, D) that a prior draws for captions. settings: its sample()'s."""
        pipeline, seeds = self.pipeline(prior=prior), range(self.seed, self.seed + len(captions))
        with autocast(self.device):
            return torch.cat([
                pipeline.prior.sample(*pipeline.text(captions[part]), **settings,
                                      noise=noise_for(seeds[part], "prior")).cpu()
                for part in in_batches(len(captions), 64)])

    def draw(self, captions, given="prior", decoder="decoder", prior="prior", scale=2.0, say=True,
             candidates=1):
        """Pictures (n, 3, S, S), drawn once each by draw_batches with the lab's seeds. The paper
        does not choose between pictures, so there is one candidate."""
        name = given if isinstance(given, str) else hash(given.cpu().numpy().tobytes())
        key = tuple(captions), name, decoder, prior, scale, say, candidates
        if key not in self.drawn:
            args = Namespace(seed=self.seed, prior_scale=1.0, prior_steps=None, scale=scale,
                             steps=None, candidates=candidates)
            batches = draw_batches(self.pipeline(decoder, prior), captions, args, given, say=say)
            self.drawn[key] = torch.cat([pictures for _, pictures in batches])
        return self.drawn[key]

    def draw_ways(self, result, ways, **settings):
        """Draw the lab's captions in several ways {name: settings of draw}, also as the result's
        picture: {name: (binding right (n,), the witness's embeddings (n, D))}."""
        drawn = {name: self.draw(self.captions, **settings, **way) for name, way in ways.items()}
        result.picture = sheet(drawn, self.captions)
        return {name: (scores(pictures, self.captions)["binding"], self.seen(pictures))
                for name, pictures in drawn.items()}

    def examples(self, stage):
        """How many examples a stage was trained on, repetitions counted."""
        return examples_seen(load_checkpoint(self.folder / f"{stage}.pt", stage))

    def caveat(self, stage):
        """What a comparison with another decoder has to be read with (fields of a Result)."""
        if not self.has(stage):
            return dict(note=f"There is no {stage}: python train.py {stage}.",
                        lacks=f"without {stage}")
        ours, theirs = self.examples("decoder"), self.examples(stage)
        caveat = {} if ours == theirs else dict(
            note=f"The decoder was trained on {ours:,} pictures, {stage} on {theirs:,}.",
            lacks="after unequal trainings")
        config = load_checkpoint(self.folder / f"{stage}.pt", stage)["config"]
        if stage == "decoder_caption" and not config.get("vocab_size"):
            caveat["note"] = (f"{caveat.get('note', '')} GLIDE reads this CLIP's features of the "
                              "words here, where the paper's learns the words itself.").strip()
        return caveat

    def systems(self):
        """What F4, F5, F8 and F9 compare, {name: settings of draw}: unCLIP and GLIDE, a decoder
        trained on captions alone. Without that one, unCLIP's own decoder with the caption alone
        takes its place: a case that made up 5% of its training."""
        if self.has("decoder_caption"):
            return {"unCLIP": {}, "GLIDE": {"given": "caption", "decoder": "decoder_caption"}}
        return {"unCLIP": {}, "unCLIP without embedding": {"given": "caption"}}
