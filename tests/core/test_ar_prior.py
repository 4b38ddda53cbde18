"""Claims about the autoregressive prior: PCA, buckets, likelihood, the cache, sampling."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ar_prior import (
    AutoregressivePrior, AutoregressivePriorConfig, equal_mass_edges, fewest_components,
    principal_components,
)
from diffusion import SeededNoise
from helpers import D, L, W, amplify, batch_of, captions, differs, flags, unit

TINY = dict(dim=D, text_width=W, text_len=L, components=4, buckets=8, dot_buckets=6, width=32,
            depth=2, heads=2)

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def stretched(n):
    """Unit embeddings that vary much in some directions and little in others."""
    return F.normalize(torch.randn(n, D) * 0.7 ** torch.arange(D) + 0.3, dim=-1)


def make_prior(**changes):
    """A fresh prior, fitted, whose learned vectors are large enough to be noticed."""
    model = AutoregressivePrior(AutoregressivePriorConfig(**TINY | changes))
    image_emb = stretched(500)
    model.fit(image_emb, F.normalize(image_emb + 0.5 * unit(500, D), dim=-1))
    return amplify(model, "position", "null", "out.weight")


# --- PCA and buckets ------------------------------------------------------------------------------


def test_components_and_variances_are_numpys_singular_values_the_largest_first():
    image_emb = stretched(300)
    mean, basis, variances = principal_components(image_emb)
    centred = image_emb.double().numpy() - image_emb.double().numpy().mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    assert_close(variances, torch.from_numpy(singular**2 / 300))
    # A direction has no sign: the cosine with numpy's is 1 or -1.
    assert_close((basis * torch.from_numpy(rows)).sum(1).abs(), torch.ones(D, dtype=torch.float64))
    assert_close(mean, image_emb.double().mean(0))


def test_pca_there_and_back_is_exact_with_all_components_and_loses_the_eigenvalues_without():
    image_emb, model = stretched(400), make_prior(components=D)
    model.fit(image_emb, image_emb)
    components, (_, _, variances) = model.project(image_emb), principal_components(image_emb)
    for kept in (1, 5, 9, D):
        error = (model.reconstruct(components[:, :kept]) - image_emb).square().sum(1).mean()
        assert_close(error.double(), variances[kept:].sum(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("error, kept", [(0.5, 1), (0.2, 2), (0.07, 3), (0.01, 4)])
def test_fewest_components_leave_less_than_the_error(error, kept):
    assert fewest_components(torch.tensor([6.0, 3.0, 0.5, 0.5]), error) == kept


def test_buckets_hold_equally_many_and_their_edges_ascend_also_with_fewer_values_than_buckets():
    values = torch.randn(3, 800) ** 3
    bucket = torch.searchsorted(equal_mass_edges(values, 8), values)
    assert all((bucket == k).sum(1).tolist() == [100, 100, 100] for k in range(8))
    for n in (1, 3, 24):
        edges = equal_mass_edges(values[:, :n], 128)
        assert (edges.diff(dim=1) >= 0).all() and (edges[:, 0] == values[:, :n].amin(1)).all()


def test_a_quantised_embedding_stays_in_its_buckets_and_moves_to_their_means():
    model, image_emb = make_prior(), stretched(500)
    model.fit(image_emb, image_emb)
    codes, components = model.quantise(image_emb), model.project(image_emb)
    again = model.dequantise(codes)
    assert torch.equal(model.quantise(again), codes)
    for c, k in product(range(4), range(8)):
        rows = codes[:, c] == k
        mean = components[rows, c].mean().expand(int(rows.sum()))
        assert_close(model.project(again)[rows, c], mean, rtol=0, atol=1e-5)


def test_fresh_keeps_the_components_that_leave_1_percent_and_is_fitted(capsys):
    class Embeddings(list):
        def pairs(self, indices, rng):
            return image_emb[list(indices)], unit(len(indices), D)

    image_emb, fields = stretched(200), {k: v for k, v in TINY.items() if k != "components"}
    model = AutoregressivePrior.fresh(fields, None, None, Embeddings(range(200)))
    _, _, variances = principal_components(image_emb)
    C, left_out = model.config.components, 1 - variances.cumsum(0) / variances.sum()
    assert left_out[C - 1] < 0.01 <= left_out[C - 2]
    assert all((torch.bincount(codes) == 25).all() for codes in model.quantise(image_emb).T)
    assert f"{C} of {D}" in capsys.readouterr().out


# --- the transformer ------------------------------------------------------------------------------


def test_a_code_changes_only_the_logits_after_it_and_padding_changes_none():
    model, codes, (text_emb, text_enc, mask) = make_prior(), torch.randint(8, (1, 4)), captions([3])
    rest, other = (torch.tensor([3]), flags(1)), (codes + torch.tensor([0, 1, 0, 0])) % 8
    a, b = (model(c, text_emb, text_enc, mask, *rest) for c in (codes, other))
    assert_close(a[:, :2], b[:, :2])
    assert differs(a[0, 2:], b[0, 2:], 1e-3)
    assert_close(model(codes, text_emb, text_enc + 5 * ~mask[..., None], mask, *rest), a)


def test_dropping_takes_away_the_caption_and_the_dot_product():
    model, codes, no, other = make_prior(), torch.randint(8, (2, 4)), flags(0, 0), captions([6, 3])
    dropped = model(codes, *captions([2, 5]), torch.tensor([0, 1]), no)
    assert_close(model(codes, *other, torch.tensor([4, 5]), no), dropped)
    assert differs(model(codes, *other, torch.tensor([4, 5]), ~no), dropped, 1e-3)


def test_loss_is_the_cross_entropy_of_the_codes_and_log_of_the_buckets_for_even_logits():
    model, batch = make_prior(drop_text=0.0), batch_of([2, 4, 6])
    image_emb, *text = batch.values()
    codes = model.quantise(image_emb)
    dot = (model.dot_edges < (image_emb * text[0]).sum(1, keepdim=True)).sum(1)
    log_p = model(codes, *text, dot, flags(1, 1, 1)).log_softmax(-1)
    assert_close(model.loss(batch), -log_p.gather(2, codes[..., None]).mean())
    nn.init.zeros_(model.out.weight), nn.init.zeros_(model.out.bias)
    assert_close(model.loss(batch), torch.tensor(8.0).log())


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_cached_pass_draws_what_the_whole_pass_would(scale):
    model, text = make_prior(), captions([2, 6, 4])
    image_emb = model.sample(*text, scale=scale, noise=SeededNoise([5, 6, 7]))
    # By hand: the same uniform numbers, and the whole sequence again for every code.
    uniform = SeededNoise([5, 6, 7])((3, 5), torch.rand)
    dot = 3 + (uniform[:, 0] * 3).long()  # of six buckets, from the top half
    yes, codes = flags(1, 1, 1), torch.zeros(3, 4, dtype=torch.long)
    for i in range(4):
        cond, uncond = (model(codes, *text, dot, keep)[:, i] for keep in (yes, ~yes))
        p = (uncond + scale * (cond - uncond)).softmax(-1)
        codes[:, i] = (p.cumsum(-1) < uniform[:, i + 1, None]).sum(-1)
    assert_close(image_emb, F.normalize(model.dequantise(codes), dim=-1))


def test_sampled_codes_have_the_models_own_frequencies_and_dot_products_the_top_halfs(monkeypatch):
    model, text, drawn, dots = make_prior(components=1), captions([4]), [], []
    model.dot_in.register_forward_hook(lambda module, inputs, output: dots.append(inputs[0]))
    monkeypatch.setattr(model, "dequantise", lambda codes: drawn.append(codes) or codes.float())
    model.sample(*(x.expand(6000, *x.shape[1:]) for x in text))
    for dot in range(6):
        codes = drawn[0][dots[0] == dot, 0]
        assert abs(len(codes) - 2000 * (dot >= 3)) < 150 * (dot >= 3) + 1
        if dot >= 3:
            logits = model(torch.zeros(1, 1).long(), *text, torch.tensor([dot]), flags(1))[0, 0]
            p, frequency = logits.softmax(-1), torch.bincount(codes, minlength=8) / len(codes)
            assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / len(codes)).sqrt() + 1e-9).all()
