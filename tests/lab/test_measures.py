"""measures.py against closed forms: intervals, entropies, probes, distances."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from lab.judge import score
from lab.measures import (
    bootstrap, entropy, frechet, linear_probe, pairs_shown, percent, precision_recall, share,
    share_interval, wrong_captions,
)
from support.shapes import COLOURS, SHAPES, TRAIN_PAIRS, Shapes, parse_caption


def test_an_interval_has_the_width_of_the_normal_distribution_and_pairs_make_it_sharp():
    values = np.random.default_rng(1).normal(0, 1, 400)
    estimate, low, high = bootstrap(np.mean, values, times=4000)
    assert estimate == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    _, low, high = bootstrap(lambda a, b: (a - b).mean(), 10 * values + 1, 10 * values)
    assert low == pytest.approx(1) and high == pytest.approx(1)


def test_what_few_scenes_do_to_an_entropy_is_corrected():
    """60 values of 20 kinds have too small an entropy, resamples a still smaller one."""
    hits, errors = {True: 0, False: 0}, {True: [], False: []}
    for k in range(60):
        values = np.random.default_rng(k).integers(0, 20, 60)
        for biased in hits:
            estimate, low, high = bootstrap(entropy, values, biased=biased, times=200)
            hits[biased] += low <= math.log(20) <= high
            errors[biased].append(estimate - math.log(20))
    assert hits[True] > 45 and hits[False] < 10
    assert abs(np.mean(errors[True])) < 0.05 < 0.1 < abs(np.mean(errors[False]))


@pytest.mark.parametrize("ones, n, low, high", [
    # Wilson's limits solve (p - share)^2 = z^2 p (1 - p) / n for p.
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (2, 120, 0.0046, 0.0587),
])
def test_wilsons_interval(ones, n, low, high):
    assert share(np.array([np.nan])) == "-" and share(np.ones(2)) == "100.0% (34.2 to 100.0) of 2"
    assert percent((0.98, 0.9, 1.04)) == "98.0% (90.0 to 100.0)"  # nothing is beyond 100%
    values = np.array([1.0] * ones + [0.0] * (n - ones) + [np.nan] * 3)
    assert share_interval(values) == pytest.approx((ones / n, low, high), abs=1e-4)
    for p in share_interval(values)[1:]:
        assert (p - ones / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-9)


@pytest.mark.parametrize("values, nats", [
    ([1, 1, 1], 0.0), ([], 0.0), ([0, 1], math.log(2)), (["a", "b", "c", "d"] * 3, math.log(4)),
    ([0, 0, 0, 1], -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
    ([2, None, 3, None], math.log(2)),  # what is not seen is left out
])
def test_entropy_of_known_frequencies(values, nats):
    assert entropy(values) == pytest.approx(nats)


def test_a_linear_probe_finds_the_log_odds_of_two_groups():
    """One input, 0 or 1: the fitted odds are those of either group, k ones to 10 - k zeros."""
    emb = torch.tensor([0.0] * 10 + [1.0] * 10)[:, None]
    counts = torch.tensor([[2, 7], [6, 3], [1, 5]])
    labels = torch.cat([(torch.arange(10) < counts[:, group, None]).T for group in (0, 1)]).float()
    log_odds = linear_probe(emb, labels)(torch.tensor([[0.0], [1.0]])).T
    torch.testing.assert_close(log_odds, (counts / (10 - counts)).log(), rtol=0, atol=1e-3)


def test_pairs_shown_are_the_colours_and_shapes_of_the_scenes():
    data, pairs = Shapes(50, "val"), list(product(COLOURS, SHAPES))
    for i, row in enumerate(pairs_shown(data)):
        things = {(t.colour, t.shape) for t in data.scene(i).things}
        assert {pairs[k] for k in row.nonzero().flatten()} == things & set(pairs)


def test_frechet_distance_of_covariances_that_do_not_commute():
    # The trace of (C_a C_b)^1/2 by numpy: the roots of the product's own eigenvalues.
    torch.manual_seed(0)
    a, b = (torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4).double() for _ in "ab")
    cov_a, cov_b = (np.cov(x.numpy().T, bias=True) for x in (a, b))
    mixed = np.sqrt(np.linalg.eigvals(cov_a @ cov_b)).real.sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(cov_a + cov_b) - 2 * mixed
    assert frechet(a, b) == pytest.approx(1000 * wanted)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_precision_and_recall_of_clouds_that_share_half():
    """Tight clusters far apart: drawn has 2 of which 1 is true; true has 3 of which 1 is drawn."""
    torch.manual_seed(0)
    one, two, three, four = (100 * torch.eye(4)[k] + 0.1 * torch.randn(30, 4) for k in range(4))
    again = 100 * torch.eye(4)[1] + 0.1 * torch.randn(30, 4)
    drawn, true = torch.cat([one, two]), torch.cat([again, three, four])
    precision, recall = precision_recall(drawn, true)
    assert precision == pytest.approx(1 / 2, abs=0.1) and recall == pytest.approx(1 / 3, abs=0.1)
    assert precision_recall(true, true) == (1, 1)


def test_wrong_captions_are_wrong_in_one_thing_only():
    data = Shapes(60, "val")
    for scene in (data.scene(i) for i in range(60) if len(data.scene(i).things) == 2):
        true, wrong = wrong_captions(scene)
        assert score(scene, parse_caption(true))["all"]
        for name, caption in wrong.items():
            result = score(scene, parse_caption(caption))
            assert result["colours"] and result["objects"]
            assert result["shapes" if name == "shape" else name] is False
            assert result["shapes"] is (name != "shape")
            pairs = {(thing.colour, thing.shape) for thing in parse_caption(caption).things}
            assert pairs <= set(TRAIN_PAIRS)
