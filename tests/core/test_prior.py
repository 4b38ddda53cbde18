"""Claims about the prior: one causal sequence, the shared prefix, dropping, guidance, sampling."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from diffusion import SeededNoise
from helpers import (
    D, FakeBatches, L, T, W, amplify, batch_of, captions, differs, flags, unit,
)
from networks import run_blocks
from prior import DiffusionPrior, PriorConfig, embedding_scale

M = 32
TINY = dict(dim=D, text_width=W, text_len=L, width=M, depth=2, heads=2,
            copies=3, diffusion_steps=T, sample_steps=10)
YES, NO = flags(1, 1, 1), flags(0, 0, 0)

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def make_prior(**changes):
    """A fresh prior whose positions, query and noised embedding are large enough to be noticed."""
    model = DiffusionPrior(PriorConfig(**TINY | changes))
    model.noised_in.weight.data.mul_(5)
    return amplify(model, "position", "query", "null")


def answer(model, x_t, t, text, keep=None):
    with torch.no_grad():
        return model(x_t, t, **model.encode_caption(*text, keep))


# --- the sequence ---------------------------------------------------------------------------------


def whole_sequence(model, x_t, t, text, keep):
    """The paper's plain way (sec. 2.2): one causal sequence of L + 4 tokens, no prefix, no copies.

    caption, text embedding, timestep, noised embedding, query; read at the query.
    """
    text_emb, text_enc, text_mask = text
    text_emb = torch.where(keep[:, None], text_emb, model.prefix.null_text_emb) * math.sqrt(D)
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(M // 2) / (M // 2))
    tokens = torch.cat([
        model.prefix.text_enc_in(text_enc),
        model.prefix.text_emb_in(text_emb)[:, None],
        model.time(torch.cat([angles.cos(), angles.sin()], dim=1))[:, None],
        model.noised_in(x_t)[:, None],
        model.query.expand(len(x_t), 1, M),
    ], dim=1) + torch.cat([model.prefix.position, model.position])
    N = L + 4
    mask = torch.zeros(len(x_t), N, N, dtype=torch.bool)
    for b in range(len(x_t)):
        for i in range(N):
            for j in range(i + 1):
                mask[b, i, j] = i == j or j >= L or (text_mask[b, j] and keep[b])
    x, _ = run_blocks(model.blocks, tokens, mask)
    return model.out(model.norm(x[:, -1]))


def test_prefix_once_and_then_the_suffix_equals_the_whole_causal_sequence():
    model, text, keep = make_prior(), captions([L, 3, 1, 5]), flags(1, 1, 0, 0)
    for t in (torch.tensor([0, 1, 20, T - 1]), torch.full((4,), T - 1)):
        x_t = torch.randn(4, D)
        with torch.no_grad():
            wanted = whole_sequence(model, x_t, t, text, keep)
        assert_close(answer(model, x_t, t, text, keep), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("K", [2, 4])
def test_copies_on_one_prefix_equal_separate_passes(K):
    # So no copy sees another: row b * K + k is copy k of example b, and answers as if alone.
    model, text, keep = make_prior(), captions([L, 3, 5]), flags(1, 1, 0)
    x_t, t = torch.randn(3 * K, D), torch.randint(0, T, (3 * K,))
    together = answer(model, x_t, t, text, keep)
    one_by_one = [answer(model, x_t[k::K], t[k::K], text, keep) for k in range(K)]
    assert_close(together, torch.stack(one_by_one, 1).flatten(0, 1), rtol=0, atol=1e-5)


def test_captions_padded_to_less_than_clips_length_give_the_same_answer():
    model, (text_emb, text_enc, text_mask) = make_prior(), captions([2, 4])
    x_t, t = torch.randn(2, D), torch.tensor([3, 30])
    short = answer(model, x_t, t, (text_emb, text_enc[:, :4], text_mask[:, :4]))
    assert_close(short, answer(model, x_t, t, (text_emb, text_enc, text_mask)))


# --- padding and dropping -------------------------------------------------------------------------


def test_prior_ignores_padding_tokens_and_reads_the_real_ones():
    model, (text_emb, text_enc, text_mask) = make_prior(), captions([L, 3, 1])
    x_t, t = torch.randn(3, D), torch.tensor([1, 20, 40])
    before = answer(model, x_t, t, (text_emb, text_enc, text_mask))
    for changed in (text_mask, ~text_mask):
        other = torch.where(changed[..., None], 10 * torch.randn_like(text_enc), text_enc)
        after = answer(model, x_t, t, (text_emb, other, text_mask))
        if changed is text_mask:
            assert differs(after, before, 1e-3)
        else:  # seen elsewhere: features behind the end of text are junk
            assert_close(after, before, rtol=0, atol=1e-5)


def test_dropping_takes_away_the_whole_caption_and_nothing_else():
    model, text, other = make_prior(), captions([L, 3, 5]), captions([2, L, 1])
    x_t, t = torch.randn(3, D), torch.tensor([1, 20, 40])
    before = answer(model, x_t, t, text, NO)
    assert_close(answer(model, x_t, t, other, NO), before, rtol=0, atol=1e-5)
    # Seen elsewhere: without the noised embedding, guidance fails above 1.
    assert differs(answer(model, torch.randn(3, D), t, text, NO), before, 1e-3)
    assert differs(answer(model, x_t, t + 5, text, NO), before, 1e-3)
    kept = answer(model, x_t, t, text, YES)
    for part in range(2):  # a kept caption enters by its pooled embedding and by its tokens
        changed = [b if k == part else a for k, (a, b) in enumerate(zip(text, other))]
        assert differs(answer(model, x_t, t, changed, YES), kept, 1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_caption_is_dropped_at_its_rate_with_a_decision_per_example(monkeypatch, rate):
    B, model, seen = 4000, make_prior(copies=2, drop_text=rate), []
    monkeypatch.setattr(model, "encode_caption", lambda *text: seen.append(text[3]) or {})
    monkeypatch.setattr(model, "forward", lambda x_t, t: torch.zeros_like(x_t))
    loss = model.loss(batch_of([1] * B))
    assert seen[0].shape == (B,)
    dropped = (~seen[0]).float().mean()
    assert abs(dropped - rate) <= 3 * math.sqrt(rate * (1 - rate) / B)  # 0 and 1: exactly
    # An answer of zero costs the mean square of the scaled embeddings.
    assert_close(loss, torch.tensor(17.2**2 / 1024), rtol=0, atol=1e-5)
    assert PriorConfig(D, W, L).drop_text == 0.1  # paper sec. 2.2


# --- the embedding's scale and the loss -----------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 512, 768, 1024])
def test_scaled_unit_embeddings_have_rms_of_0_54(dim):
    rms = (unit(10, dim) * embedding_scale(dim)).square().mean(1).sqrt()
    assert_close(rms, torch.full((10,), 17.2 / 32), rtol=0, atol=1e-5)
    assert abs(rms.mean() - 0.54) < 0.005  # the paper's 17.2 at 1024 dimensions


def test_loss_does_not_scale_the_batchs_embeddings_in_place():
    model, batch = make_prior(), batch_of([L, 3])
    before = {name: value.clone() for name, value in batch.items()}
    model.loss(batch)  # seen elsewhere: cached embeddings scaled at each use
    assert_close(batch, before, rtol=0, atol=0)


def test_training_shows_k_copies_of_each_embedding_each_at_its_own_t(monkeypatch):
    B, K = 200, 3
    model, batch, seen = make_prior(copies=K), batch_of([4] * B), []
    x_0 = (batch["image_emb"] * embedding_scale(D)).repeat_interleave(K, 0)

    def oracle(x_t, t, **cond):
        seen.append((x_t, t))
        return x_0

    monkeypatch.setattr(model, "forward", oracle)
    assert_close(model.loss(batch), torch.tensor(0.0), rtol=0, atol=1e-10)
    (x_t, t), alpha_bar = seen[0], model.diffusion.alphas_cumprod
    assert (t.view(B, K)[:, 0] != t.view(B, K)[:, 1]).float().mean() > 0.9
    signal, sigma = alpha_bar[t].sqrt().float()[:, None], (1 - alpha_bar[t]).sqrt().float()[:, None]
    noise = ((x_t - signal * x_0) / sigma).view(B, K * D)  # DDPM eq. 4 solved for it
    covariance = noise.T @ noise / B  # independent in each copy
    assert (covariance - torch.eye(K * D)).abs().max() < 5.5 / math.sqrt(B)


def test_finish_measures_the_analytic_variance_of_this_network_and_data(monkeypatch):
    model, batch = make_prior(), batch_of([3] * 40)
    assert not model.diffusion.x_0_variance.any()
    x_0, t, fresh = batch["image_emb"] * embedding_scale(D), torch.full((40,), T - 1), model.forward
    # A network that knows a little: what errs more than the mean of the data is not counted.
    monkeypatch.setattr(model, "forward", lambda *x, **cond: 0.6 * x_0 + 0.2 * fresh(*x, **cond))
    model.finish(batch)
    # At the noisiest level x_t is nearly pure noise: the mean squared error there, by hand.
    text = batch["text_emb"], batch["text_enc"], batch["text_mask"]
    by_hand = (answer(model, torch.randn(40, D), t, text) - x_0).square().mean().double()
    assert_close(model.diffusion.x_0_variance[-1], by_hand, rtol=0.1, atol=0)


# --- guidance and sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_goes_from_no_caption_at_0_to_the_caption_at_1_and_beyond(monkeypatch, scale):
    model, text = make_prior(), captions([L, 3, 5])
    x_t, t = torch.randn(3, D), torch.tensor([30, 30, 30])
    cond, uncond = (answer(model, x_t, t, text, keep) for keep in (YES, NO))
    monkeypatch.setattr(model.diffusion, "sample", lambda network, shape, **kw: network(x_t, t))
    drawn = model.sample(*text, scale=scale, candidates=1)
    wanted = {0.0: uncond, 1.0: cond, 3.0: 3 * cond - 2 * uncond}[scale]
    assert_close(drawn, F.normalize(wanted, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("predict", ["x_0", "noise"])
def test_sampling_with_an_oracle_returns_its_embedding(monkeypatch, predict):
    model, text, candidates = make_prior(predict=predict), captions([L, 3, 5]), 2
    # Scaled, its largest entry is 2: an embedding is not a picture, and must not be clipped at 1.
    target = F.normalize(torch.randn(3, D) + 4 * torch.eye(3, D), dim=-1)
    scaled = (target * embedding_scale(D)).repeat_interleave(candidates, 0)
    assert scaled.abs().max() > 1.5

    def oracle(x_t, t, cache, key_mask):
        alpha_bar = model.diffusion.alphas_cumprod[t].float()[:, None]
        noise = (x_t - alpha_bar.sqrt() * scaled) / (1 - alpha_bar).sqrt()
        return {"x_0": scaled, "noise": noise}[predict]

    monkeypatch.setattr(model, "forward", oracle)
    assert_close(model.sample(*text, candidates=candidates), target, rtol=0, atol=1e-4)


def test_sampling_takes_the_configured_steps_or_those_asked_for_and_gives_unit_norm():
    assert PriorConfig(D, W, L).sample_steps == 64  # paper table 3
    for steps, wanted in ((None, TINY["sample_steps"]), (4, 4)):
        visited = []
        drawn = make_prior().sample(
            *captions([L, 3]), scale=2, steps=steps, on_step=lambda k, t, *x: visited.append(t))
        assert len(visited) == wanted and visited[0] == T - 1 and visited[-1] == 0
        assert_close(drawn.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)


def test_sample_keeps_each_captions_better_of_two_different_draws(monkeypatch):
    model, text, seen = make_prior(), captions([L, 3, 5]), []
    draw = model.diffusion.sample
    monkeypatch.setattr(
        model.diffusion, "sample", lambda *args, **kw: seen.append(draw(*args, **kw)) or seen[0])
    kept = model.sample(*text, scale=2, noise=SeededNoise([1, 2, 3]))  # two (paper sec. 2.2)
    # What diffusion returns: all candidates of the first caption, then all of the second, ...
    candidates = F.normalize(seen[0], dim=-1).view(3, 2, D)
    assert differs(candidates[:, 0], candidates[:, 1])
    best = torch.einsum("bcd,bd->bc", candidates, text[0]).argmax(1)
    assert_close(kept, candidates[torch.arange(3), best], rtol=0, atol=1e-6)


def test_preview_compares_a_drawn_embedding_with_the_true_the_captions_and_anothers():
    batch, seen = batch_of([3, 4, 5]), []

    def sample(*text, noise):  # draws half-way between the true one and the caption's
        seen.append(noise((3, 2)))
        return F.normalize(batch["image_emb"] + batch["text_emb"], dim=-1)

    figures, *nothing = DiffusionPrior.preview(SimpleNamespace(sample=sample), FakeBatches(batch))
    drawn, image_emb = sample(noise=SeededNoise([0, 1, 2])), batch["image_emb"]
    wanted = {"cos_true": image_emb, "cos_text": batch["text_emb"],
              "cos_unrelated": image_emb[[2, 0, 1]]}
    for name, other in wanted.items():
        assert figures[name] == pytest.approx(F.cosine_similarity(drawn, other).mean().item())
    assert nothing == [None, None]
    assert_close(seen[0], seen[1], rtol=0, atol=0)  # always the same noise
