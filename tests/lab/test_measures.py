"""measures.py: intervals and entropies against closed forms (distances: tests/test_evaluate.py)."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from lab.measures import (
    bootstrap, entropy, frechet_distance, linear_probe,
    pairs_shown, share_interval,
)
from support.shapes import COLOURS, SHAPES, Shapes


def test_a_95_percent_interval_holds_the_true_mean_in_95_percent_of_cases():
    rng, hits = np.random.default_rng(0), 0
    for k in range(300):
        _, low, high = bootstrap(np.mean, rng.normal(3.0, 2.0, 50), times=200, seed=k)
        hits += low <= 3.0 <= high
    # 95% less what 50 points and 200 resamplings miss; three standard errors are 3.8%.
    assert 0.89 <= hits / 300 <= 0.985


def test_the_interval_of_a_mean_has_the_width_that_the_normal_distribution_gives():
    values = np.random.default_rng(1).normal(0, 1, 400)
    estimate, low, high = bootstrap(np.mean, values, times=4000)
    assert estimate == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)


def test_rows_are_resampled_together_so_a_paired_difference_is_sharp():
    noise = np.random.default_rng(2).normal(0, 10, 100)
    _, low, high = bootstrap(lambda a, b: (a - b).mean(), noise + 1, noise)
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
    values = np.array([1.0] * ones + [0.0] * (n - ones) + [np.nan] * 3)
    assert share_interval(values) == pytest.approx((ones / n, low, high), abs=1e-4)
    for p in share_interval(values)[1:]:
        assert (p - ones / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-9)


def test_the_share_of_nothing_is_not_a_number():
    assert np.isnan(share_interval(np.array([np.nan]))).all()


@pytest.mark.parametrize("values, nats", [
    ([1, 1, 1], 0.0), ([], 0.0), ([0, 1], math.log(2)), (["a", "b", "c", "d"] * 3, math.log(4)),
    ([0, 0, 0, 1], -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
    ([2, -1, 3, None, -1], math.log(2)),  # what is not seen is left out
])
def test_entropy_of_known_frequencies(values, nats):
    assert entropy(values) == pytest.approx(nats)


def test_a_linear_probe_reads_both_signs_and_their_and_but_not_their_exclusive_or():
    """Of two signs a, b. "a != b" is the textbook's counterexample: no line has both its corners on
    one side and the other two on the other."""
    signs = torch.randint(0, 2, (4000, 2), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    a, b = signs.T > 0
    labels = torch.stack([a, b, a & b, a != b], dim=1).float()
    right = (linear_probe(signs[:2000], labels[:2000])(signs[2000:]) > 0) == (labels[2000:] > 0)
    assert right[:, :3].all()
    assert right[:, 3].float().mean() < 0.8  # three corners of four at the best


def test_a_linear_probe_finds_the_log_odds_of_two_groups():
    """One input, 0 or 1: the fitted odds are those of either group, k ones to 10 - k zeros."""
    emb = torch.tensor([0.0] * 10 + [1.0] * 10)[:, None]
    counts = torch.tensor([[2, 7], [6, 3], [1, 5]])
    labels = torch.cat([(torch.arange(10) < counts[:, group, None]).T for group in (0, 1)]).float()
    log_odds = linear_probe(emb, labels)(torch.tensor([[0.0], [1.0]])).T
    torch.testing.assert_close(log_odds, (counts / (10 - counts)).log(), rtol=0, atol=1e-3)


def test_pairs_shown_are_the_colours_and_shapes_of_the_scenes():
    data = Shapes(50, "val")
    shown, pairs = pairs_shown(data), list(product(COLOURS, SHAPES))
    assert shown.shape == (50, len(COLOURS) * len(SHAPES))
    for i, row in enumerate(shown):
        named = {pairs[k] for k in row.nonzero().flatten().tolist()}
        things = {(t.colour, t.shape) for t in data.scene(i).things}
        assert named == {thing for thing in things if thing in pairs}


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    points = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = (points - points.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(points.T, correction=0)).T)  # mean 0, covariance 1, exactly
    assert frechet_distance(points, points + 2) == pytest.approx(3 * 4)
    assert frechet_distance(points, 3 * points) == pytest.approx(3 * (3 - 1) ** 2)
