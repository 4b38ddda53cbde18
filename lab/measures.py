"""What is measured, apart from who asks: distances in CLIP's space, probes, entropy, intervals.

evaluate.py and findings.py count over hundreds of scenes; what both need is here. A figure without
its uncertainty is a rumour, so the tool that matters most is the bootstrap (Efron 1979): draw the
scenes again, with repetition, from those at hand, and see how far the figure moves.

The one idea: everything is a statistic of paired rows, one row a scene. Two systems draw the same
scenes from the same seeds, so what makes a scene hard for both drops out of their *difference*,
which has an interval of its own.

Letters: n, m number of scenes, D CLIP embedding.
Read next: evaluate.py, then findings.py.
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

from lab.judge import LEAST
from support.cache import Pictures
from support.shapes import COLOURS, Claim, SHAPES, with_article
from support.tools import UserError

# --- many scenes at once ---------------------------------------------------------------------


def in_batches(n, size=16):
    """range(n) in pieces: slices of at most `size`, with a progress bar."""
    return (slice(k, min(k + size, n)) for k in tqdm(range(0, n, size), "drawing", disable=None))


def scene_claim(scene):
    """All that is true of a scene, as the judge's claim."""
    return Claim(scene.things, scene.relation, scene.background, scene.word)


@torch.no_grad()
def look(clip, data):
    """CLIP's embeddings (n, D) of all pictures of a data set."""
    embs, seen = [], Pictures(data, clip)
    for start in tqdm(range(0, len(data), 64), "embedding", disable=None):
        pictures = torch.stack([seen[i] for i in range(start, min(start + 64, len(data)))])
        embs.append(clip.encode_image(pictures.to(clip.mean.device)))
    return torch.cat(embs)


def draw_batches(pipeline, captions, seed, given, size, say=True, scale=2.0, steps=None,
                 prior=(1.0, None), candidates=1):
    """Captions -> batches (slice, pictures (b, 3, size, size) on the CPU); picture k of all has the
    seed `seed` + k.

    given: what stands for the image embedding: "prior", "text_emb", "caption" (nothing), or
    embeddings (n, D). say=False: the decoder does not get the caption. prior: (scale, steps) of
    Pipeline.embed.
    candidates: of how many pictures the best is kept (Pipeline.decode_best); 1 as in the paper.
    """
    for part in in_batches(len(captions)):
        seeds = range(seed + part.start, seed + part.stop)
        text = pipeline.text(captions[part]) if say or isinstance(given, str) else None
        if isinstance(given, str):
            emb = pipeline.condition(given, text, seeds, *prior)
        else:
            emb = given[part]
        text = text if say else None
        batch, _ = pipeline.decode_best(candidates, emb, text, seeds, scale=scale, steps=steps)
        yield part, pipeline.upsample(batch, seeds, size).cpu()


def draw_many(*args, **settings):
    """All pictures of draw_batches at once: (n, 3, size, size)."""
    return torch.cat([pictures for _, pictures in draw_batches(*args, **settings)])


def mixed_captions(data):
    """A caption of each scene: a sparse, a middle and a full one in turn."""
    return [data.captions(i)[i % 3] for i in range(len(data))]


def check_side(pipeline):
    """The judge needs pictures of LEAST pixels or more."""
    if pipeline.sizes[-1] < LEAST:
        raise UserError(f"{pipeline.folder} draws {pipeline.sizes[-1]} pixels, the judge needs "
                        f"{LEAST}: train upsampler1")


OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def wrong_captions(scene):
    """A two-object scene -> its plain caption, and {what is wrong: a caption with that wrong}."""
    a, b = scene.things

    def say(a, b, relation):
        return f" {relation} ".join(with_article(f"{t.colour} {t.shape}") for t in (a, b))

    wrong = {"relation": say(a, b, OPPOSITE[scene.relation])}
    if a.colour != b.colour and a.shape != b.shape:
        # The same words, the colours exchanged: only who is bound to what has changed.
        swapped = replace(a, colour=b.colour), replace(b, colour=a.colour)
        wrong["binding"] = say(*swapped, scene.relation)
    others = [shape for shape in SHAPES if shape not in (a.shape, b.shape)]
    wrong["shape"] = say(replace(a, shape=others[0]), b, scene.relation)
    return say(a, b, scene.relation), wrong


def prefers(clip, emb, true, wrong):
    """Per embedding (n, D): 1 if it is closer to its true caption than to its wrong one, else 0.

    Equally close to both, it is a guess: half right. true, wrong: n captions each, or one true one
    and its embedding against n wrong ones. Returns (n,).
    """
    gap = ((clip.encode_text(true)[0] - clip.encode_text(wrong)[0]) * emb).sum(1).cpu().numpy()
    return np.where(np.abs(gap) < 1e-6, 0.5, gap > 0)


def pairs_shown(data):
    """Per scene, 1 for each pair of colour and shape that it shows: (n, colours * shapes)."""
    pairs = list(product(COLOURS, SHAPES))
    shown = [[(t.colour, t.shape) for t in data.scene(i).things] for i in range(len(data))]
    return torch.tensor([[float(pair in things) for pair in pairs] for things in shown])


def linear_probe(emb, labels, rounds=300):
    """Logistic regression, embeddings (n, D) -> labels (n, k) of zeros and ones: returns the fitted
    function, embeddings (m, D) -> log-odds (m, k). What it finds lies open in the embedding.

    A convex problem: the best fit is one point, wherever the search for it begins (here at zero).
    """
    weight = torch.zeros(emb.shape[1], labels.shape[1], device=emb.device, requires_grad=True)
    bias = torch.zeros(labels.shape[1], device=emb.device, requires_grad=True)
    scores = lambda emb: emb.shape[1]**0.5 * emb @ weight + bias  # noqa: E731
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=rounds, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(scores(emb), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return lambda emb: scores(emb).detach()


# --- distances in CLIP's space ----------------------------------------------------------------


def frechet_distance(a, b):
    """Squared Frechet distance of the gaussians that fit points a (n, D) and b (m, D).

        |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)     (FID, 1706.08500)

    Few points have covariances that are too small in most directions: use several times D.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T, correction=0), torch.cov(b.T, correction=0)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C_a^1/2
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * mixed).item()


def nearest_distances(points, k):
    """Distance of each of points (n, D) to its k-th nearest neighbour among the others: (n,)."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the 0th is itself


def precision_recall(drawn, true, k=3):
    """Share of drawn points that lie among the true ones, and the reverse (1904.06991).

    A point lies among others if it is no farther from one of them than that one's own k-th nearest
    neighbour. Precision falls with bad pictures, recall with missing variety.
    """
    distance = torch.cdist(drawn, true)  # (n, m)
    precision = (distance <= nearest_distances(true, k)).any(dim=1)
    recall = (distance.T <= nearest_distances(drawn, k)).any(dim=1)
    return precision.float().mean().item(), recall.float().mean().item()


# --- intervals and entropy -------------------------------------------------------------------


def bootstrap(statistic, *rows, biased=False, times=1000, seed=0):
    """A figure and its 95% interval: (estimate, low, high).

    statistic: a function of arrays or tensors -> float. rows: its arguments, of n rows each; row i
    of all of them belongs to scene i, so all are drawn again together.

    biased: for figures that few scenes make too small (an entropy) or too large (a Frechet
    distance). Resampling repeats scenes and errs in the same way once more, so twice the estimate
    less what the resamples say takes that error out, of the figure and of its interval (the
    *basic* interval). Else the interval is the resamples' 2.5% and 97.5% quantiles.
    """
    rows = [np.asarray(r) for r in rows]
    n, rng = len(rows[0]), np.random.default_rng(seed)
    estimate = float(statistic(*rows))
    again = []
    for _ in range(times):
        picked = rng.integers(n, size=n)
        with warnings.catch_warnings():  # a mean over nothing is NaN, and is left out below
            warnings.simplefilter("ignore", RuntimeWarning)
            again.append(float(statistic(*(r[picked] for r in rows))))
    if np.isnan(again).all():
        return estimate, math.nan, math.nan
    low, high = np.nanquantile(again, (0.025, 0.975)).tolist()
    if biased:
        return 2 * estimate - float(np.nanmean(again)), 2 * estimate - high, 2 * estimate - low
    return estimate, low, high


def share_interval(values):
    """The share of ones among zeros and ones (n,), NaNs left out, with Wilson's 95% interval:
    (share, low, high). Unlike the bootstrap's it does not shrink to a point at 0 or 1.
    """
    values = values[~np.isnan(values)]
    n, z = len(values), 1.959964  # a normal variable is within +- z in 95% of cases
    if n == 0:
        return (math.nan,) * 3
    share = float(values.mean())
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return share, centre - half, centre + half


def entropy(values):
    """Entropy in nats of the values' frequencies; None and -1 are not seen and left out."""
    values = [v for v in values if v is not None and v != -1]
    counts = np.array(list(Counter(values).values()) or [1])
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
