"""What is measured, whoever asks: many pictures at once, CLIP's space, intervals, entropy.

A figure without its uncertainty is a rumour. The bootstrap (Efron 1979) draws the scenes again,
with repetition, from those at hand, and sees how far the figure moves. Rows are paired, one row a
scene: whatever makes a scene hard for two systems alike cancels out of their *difference*.

n, m: number of scenes; D: size of a CLIP embedding.
"""

import math
import warnings
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lab.judge import S
from manipulate import invert, redraw
from sample import Pipeline
from support.shapes import COLOURS, SHAPES, render, with_article
from support.sheets import to_tensor
from support.tools import UserError


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
                            for i in range(len(data))[part]]).to(clip.mean.device)

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
    """A two-object scene -> its plain caption, and {what is wrong: a caption with that wrong}."""
    a, b = scene.things
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}

    def say(a, b, relation):
        return f" {relation} ".join(with_article(f"{t.colour} {t.shape}") for t in (a, b))

    wrong = {"relation": say(a, b, opposite[scene.relation])}
    if a.colour != b.colour and a.shape != b.shape:
        # The same words with the colours exchanged: only the binding has changed.
        swapped = replace(a, colour=b.colour), replace(b, colour=a.colour)
        wrong["binding"] = say(*swapped, scene.relation)
    other = next(shape for shape in SHAPES if shape not in (a.shape, b.shape))
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
    shown = [[(t.colour, t.shape) for t in scene.things] for scene in scenes_of(data)]
    return torch.tensor([[float(pair in things) for pair in product(COLOURS, SHAPES)]
                         for things in shown])


def linear_probe(emb, labels, rounds=300):
    """Logistic regression from embeddings (n, D) to labels (n, k) of zeros and ones: what lies open
    in the embedding? Returns the fitted function, embeddings (m, D) -> log-odds (m, k)."""
    weight = torch.zeros(emb.shape[1], labels.shape[1], device=emb.device, requires_grad=True)
    bias = torch.zeros(labels.shape[1], device=emb.device, requires_grad=True)
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
    precision = (distance <= radii(true)).any(dim=1)
    recall = (distance.T <= radii(drawn)).any(dim=1)
    return precision.float().mean().item(), recall.float().mean().item()


def bootstrap(statistic, *rows, biased=False, times=1000, seed=0):
    """A figure and its 95% interval: (estimate, low, high).

    statistic: a function of arrays -> float. rows: its arguments, n rows each. Row i of every
    argument belongs to scene i, so they are resampled together.
    biased: for figures that few scenes make too small (an entropy) or too large (a Frechet
    distance). Resampling repeats scenes and so errs the same way once more; twice the estimate
    minus what the resamples say removes that error (and makes the *basic* interval)."""
    rows = [np.asarray(r) for r in rows]
    n, rng, again = len(rows[0]), np.random.default_rng(seed), []
    estimate = float(statistic(*rows))
    with warnings.catch_warnings():  # the mean of nothing is NaN, and such resamples are left out
        warnings.simplefilter("ignore", RuntimeWarning)
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
    values = values[~np.isnan(values)]
    n, z = len(values), 1.959964  # a normal variable is within +- z in 95% of cases
    if n == 0:
        return (math.nan,) * 3
    share = float(values.mean())
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return share, centre - half, centre + half


def entropy(values):
    """Entropy in nats of the values' frequencies; None means "not seen" and is left out."""
    counts = np.array(list(Counter(v for v in values if v is not None).values()) or [1])
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
