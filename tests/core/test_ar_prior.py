"""Claims about the autoregressive prior: PCA, buckets, likelihood, the cache, sampling."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ar_prior import (
    AutoregressivePrior, AutoregressivePriorConfig, equal_mass_edges, equal_width_edges,
    fewest_components, principal_components, quantisation_errors,
)

D, W, L = 12, 10, 6
TINY = dict(dim=D, text_width=W, text_len=L, components=4, buckets=8, dot_buckets=6, width=32,
            depth=2, heads=2)

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def stretched(n):
    """Unit embeddings that vary much in some directions and little in others."""
    return F.normalize(torch.randn(n, D) * 0.7 ** torch.arange(D) + 0.3, dim=-1)


def make_prior(**changes):
    """A fresh prior, fitted, whose learned vectors are large enough to be noticed."""
    model = AutoregressivePrior(AutoregressivePriorConfig(**TINY | changes)).eval()
    for name, p in model.named_parameters():
        if "position" in name or "null" in name or name == "out.weight":
            nn.init.normal_(p)
    image_emb = stretched(500)
    model.fit(image_emb, F.normalize(image_emb + 0.5 * unit(500, D), dim=-1))
    return model


def captions(lengths):
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return unit(len(lengths), D), torch.randn(len(lengths), L, W), mask


def seeds(numbers):
    return [torch.Generator().manual_seed(k) for k in numbers]


# --- PCA and buckets


def test_components_and_variances_are_numpys_singular_values():
    image_emb = stretched(300)
    mean, basis, variances = principal_components(image_emb)
    centred = image_emb.double().numpy() - image_emb.double().numpy().mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    assert_close(variances, torch.from_numpy(singular**2 / 300))
    # A direction has no sign: the cosine with numpy's is 1 or -1.
    assert_close((basis * torch.from_numpy(rows)).sum(1).abs(), torch.ones(D, dtype=torch.float64))
    assert_close(mean, image_emb.double().mean(0))


def test_pca_there_and_back_is_exact_with_all_components_and_loses_the_eigenvalues_without():
    image_emb = stretched(400)
    model = AutoregressivePrior(AutoregressivePriorConfig(**TINY | {"components": D}))
    model.fit(image_emb, image_emb)
    components = model.project(image_emb)
    assert_close(model.reconstruct(components), image_emb, atol=1e-5, rtol=0)
    _, _, variances = principal_components(image_emb)
    for kept in (1, 5, 9):
        error = (model.reconstruct(components[:, :kept]) - image_emb).square().sum(1).mean()
        assert_close(error.double(), variances[kept:].sum(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("error, kept", [(0.5, 1), (0.2, 2), (0.07, 3), (0.01, 4)])
def test_fewest_components_leave_less_than_the_error(error, kept):
    assert fewest_components(torch.tensor([6.0, 3.0, 0.5, 0.5]), error) == kept


def test_equal_mass_buckets_hold_equally_many_and_equal_width_ones_are_equally_wide():
    values = torch.randn(3, 800) ** 3
    mass = torch.searchsorted(equal_mass_edges(values, 8), values)
    assert all((mass == k).sum(1).tolist() == [100, 100, 100] for k in range(8))
    width = equal_width_edges(values, 8).diff(dim=1)
    assert_close(width, width[:, :1].expand(-1, 6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 24])
def test_edges_ascend_also_with_fewer_values_than_buckets(n):
    values = torch.randn(2, n)
    edges = equal_mass_edges(values, 128)
    assert (edges.diff(dim=1) >= 0).all()
    assert (edges[:, 0] == values.amin(1)).all()


def test_a_quantised_embedding_stays_in_its_buckets():
    model, image_emb = make_prior(), stretched(200)
    codes = model.quantise(image_emb)
    assert codes.shape == (200, 4) and codes.min() >= 0 and codes.max() < 8
    again = model.dequantise(codes)
    assert torch.equal(model.quantise(again), codes)
    # So no component is off by more than its bucket is wide (the outer ones have no end).
    inner = (codes > 0) & (codes < 7)
    edges = F.pad(model.edges, (1, 1))
    wide = (edges[:, 1:] - edges[:, :-1]).gather(1, codes.T).T
    off = (model.project(again) - model.project(image_emb)).abs()
    assert inner.any() and (off <= wide)[inner].all()


def test_quantisation_error_of_a_uniform_variable_is_one_over_buckets_squared():
    # A bucket of width w around its mean has variance w^2 / 12, the whole has 1 / 12.
    values = torch.linspace(0, 1, 6400).expand(2, -1).contiguous()
    for error in quantisation_errors(values, 16).values():
        assert_close(error, 1 / 16**2, rtol=1e-2, atol=0)


# --- the transformer


def test_likelihoods_of_all_sentences_of_a_tiny_vocabulary_sum_to_one():
    model = make_prior(components=3, buckets=3)
    codes = torch.tensor(list(product(range(3), repeat=3)))
    text = [x.expand(27, *x.shape[1:]) for x in captions([5])]
    logits = model(codes, *text, torch.full((27,), 2), torch.ones(27, dtype=torch.bool))
    log_p = logits.log_softmax(-1).gather(2, codes[..., None]).sum((1, 2))
    assert_close(log_p.exp().sum(), torch.tensor(1.0))
    assert log_p.exp().std() > 1e-3  # and not because they are all alike


def test_a_code_changes_only_the_logits_after_it():
    model = make_prior()
    codes, text = torch.randint(8, (1, 4)), captions([4])
    other = codes.clone()
    other[0, 1] = (other[0, 1] + 1) % 8
    dot, keep = torch.tensor([3]), torch.tensor([True])
    a, b = model(codes, *text, dot, keep), model(other, *text, dot, keep)
    assert_close(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2], b[:, 2], atol=1e-3)


def test_dropping_takes_away_the_caption_and_the_dot_product():
    model = make_prior()
    codes, drop = torch.randint(8, (2, 4)), torch.zeros(2, dtype=torch.bool)
    a = model(codes, *captions([2, 5]), torch.tensor([0, 1]), drop)
    b = model(codes, *captions([6, 3]), torch.tensor([4, 5]), drop)
    assert_close(a, b)
    kept = model(codes, *captions([6, 3]), torch.tensor([4, 5]), ~drop)
    assert not torch.allclose(a, kept, atol=1e-3)


def test_padding_is_never_looked_at():
    model = make_prior()
    text_emb, text_enc, mask = captions([3])
    codes, dot, keep = torch.randint(8, (1, 4)), torch.tensor([3]), torch.tensor([True])
    a = model(codes, text_emb, text_enc, mask, dot, keep)
    assert_close(a, model(codes, text_emb, text_enc + 5 * ~mask[..., None], mask, dot, keep))


def test_loss_of_even_logits_is_log_of_the_number_of_buckets():
    model = make_prior()
    nn.init.zeros_(model.out.weight), nn.init.zeros_(model.out.bias)
    text_emb, text_enc, text_mask = captions([2, 4, 6])
    batch = {"image_emb": stretched(3), "text_emb": text_emb, "text_enc": text_enc,
             "text_mask": text_mask}
    assert_close(model.loss(batch), torch.tensor(8.0).log())


def test_it_learns_to_read_the_caption():
    """Two captions, two embeddings: after training each caption gives its own."""
    torch.manual_seed(0)
    model = make_prior(dot_buckets=2)  # of which sampling asks for the upper one, as here
    two = stretched(2)
    text = two, *captions([3, 5])[1:]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        rows = torch.randint(2, (32,))
        batch = dict(zip(("text_emb", "text_enc", "text_mask"), (x[rows] for x in text)))
        loss = model.loss(batch | {"image_emb": two[rows]})
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    codes = model.quantise(model.sample(*text, scale=2.0, generators=seeds([0, 1])))
    assert torch.equal(codes, model.quantise(two))


# --- sampling


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_cached_pass_draws_what_the_whole_pass_would(scale):
    model, text = make_prior(), captions([2, 6, 4])
    image_emb = model.sample(*text, scale=scale, generators=seeds([5, 6, 7]))
    # By hand: the same uniform numbers, the whole sequence again for every code.
    uniform = torch.stack([torch.rand(5, generator=g) for g in seeds([5, 6, 7])])
    dot = 3 + (uniform[:, 0] * 3).long()
    yes, codes = torch.ones(3, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.long)
    for i in range(4):
        cond = model(codes, *text, dot, yes)[:, i]
        uncond = model(codes, *text, dot, ~yes)[:, i]
        p = (uncond + scale * (cond - uncond)).softmax(-1)
        codes[:, i] = (p.cumsum(-1) < uniform[:, i + 1, None]).sum(-1)
    assert_close(image_emb, F.normalize(model.dequantise(codes), dim=-1))


def test_sampled_codes_have_the_models_own_frequencies(monkeypatch):
    model = make_prior(components=1, dot_buckets=2)  # the upper half of two buckets is the second
    text = captions([4])
    many = [x.expand(4000, *x.shape[1:]) for x in text]
    drawn = []
    monkeypatch.setattr(model, "dequantise", lambda codes: drawn.append(codes) or codes.float())
    model.sample(*many)
    codes, dot = torch.zeros(1, 1, dtype=torch.long), torch.tensor([1])
    logits = model(codes, *text, dot, torch.tensor([True]))
    p = logits[0, 0].softmax(-1)
    frequency = torch.bincount(drawn[0][:, 0], minlength=8) / 4000
    assert ((frequency - p).abs() < 4 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()


def test_the_dot_product_token_is_drawn_from_the_top_half(monkeypatch):
    model, seen = make_prior(), []
    model.dot_in.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.sample(*(x.expand(200, *x.shape[1:]) for x in captions([4])))
    assert sorted(set(seen[0].tolist())) == [3, 4, 5]


def test_an_embedding_drawn_in_a_batch_equals_the_one_drawn_alone_and_has_unit_norm():
    model, text = make_prior(), captions([2, 6, 4])
    together = model.sample(*text, scale=2.0, generators=seeds([5, 6, 7]))
    alone = model.sample(*(x[1:2] for x in text), scale=2.0, generators=seeds([6]))
    assert_close(together[1:2], alone)
    assert_close(together.norm(dim=1), torch.ones(3))
