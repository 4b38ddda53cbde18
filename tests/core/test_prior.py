"""Claims about the prior: sequence and mask, the shared prefix, dropping, guidance, sampling."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from networks import Block, attention, causal_mask, run_blocks
from prior import DiffusionPrior, PriorConfig, embedding_scale, rerank

D, W, L, M, T = 16, 12, 8, 32, 50
TINY = dict(dim=D, text_width=W, text_len=L, width=M, depth=2, heads=2,
            copies=3, diffusion_steps=T, sample_steps=10)


pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def make_prior(**changes):
    """A fresh prior whose positions, query and noised embedding are large enough to be noticed."""
    model = DiffusionPrior(PriorConfig(**TINY | changes)).eval()
    model.noised_in.weight.data.mul_(5)
    for name, p in model.named_parameters():
        if "position" in name or "query" in name or "null" in name:
            nn.init.normal_(p)
    return model


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def captions(lengths, dim=D):
    """text_emb, text_enc, text_mask of captions with so many real tokens each."""
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return unit(len(lengths), dim), torch.randn(len(lengths), L, W), mask


def yes(*values):
    return torch.tensor(values, dtype=torch.bool)


def seeds(numbers):
    return [torch.Generator().manual_seed(k) for k in numbers]


def only_call(monkeypatch, model, x_t, t):
    """Let model.sample call its network once, at (x_t, t), and return what the network answers."""
    monkeypatch.setattr(model.diffusion, "sample", lambda network, shape, **kw: network(x_t, t))


# --- the transformer ------------------------------------------------------------------------


def test_block_equals_torchs_own_pre_norm_transformer_layer():
    block = Block(M, heads=4).eval()
    torchs = nn.TransformerEncoderLayer(
        M, 4, 4 * M, dropout=0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    for ours, theirs in (
        (block.qkv.weight, torchs.self_attn.in_proj_weight),
        (block.qkv.bias, torchs.self_attn.in_proj_bias),
    ):
        theirs.data.copy_(ours)
    for ours, theirs in (
        (block.out, torchs.self_attn.out_proj),
        (block.mlp[0], torchs.linear1),
        (block.mlp[2], torchs.linear2),
        (block.norm_1, torchs.norm1),
        (block.norm_2, torchs.norm2),
    ):
        nn.init.normal_(ours.bias)
        theirs.load_state_dict(ours.state_dict())
    x, mask = torch.randn(2, 7, M), torch.ones(7, 7, dtype=torch.bool).tril()
    with torch.no_grad():  # torch's mask says who may *not* look
        assert_close(block(x, mask[None])[0], torchs(x, src_mask=~mask), rtol=0, atol=1e-5)


def test_causal_mask_shows_real_tokens_up_to_oneself():
    mask = causal_mask(yes(1, 0, 1, 0)[None])[0]
    wanted = [
        [1, 0, 0, 0],
        [1, 1, 0, 0],  # a padding token sees itself, or its softmax would be 0 / 0
        [1, 0, 1, 0],  # nobody else sees it
        [1, 0, 1, 1],
    ]
    assert_close(mask, torch.tensor(wanted, dtype=torch.bool))


def test_changing_a_token_leaves_the_outputs_before_it_as_they_were():
    model, N = make_prior(), L + 4
    text, x_t, t = captions([L]), torch.randn(1, D), torch.tensor([20])
    change, outputs = torch.zeros(1, N, M), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] + change, *args[1:]))
    model.blocks[-1].register_forward_hook(lambda module, args, out: outputs.append(out[0][0]))
    with torch.no_grad():
        model(x_t, t, *text)
        for j in range(N):
            change.zero_()[0, j] = torch.randn(M)
            model(x_t, t, *text)
            assert_close(outputs[-1][:j], outputs[0][:j], rtol=0, atol=1e-6)
            moved = (outputs[-1][j:] - outputs[0][j:]).abs().amax(1)
            assert (moved > 1e-4).all(), f"token {j} is not seen by all that come after it"


def test_sequence_is_caption_text_emb_timestep_noised_emb_and_query():
    model, K = make_prior(), 2
    text_emb, text_enc, text_mask = captions([5, L])
    x_t, t = torch.randn(2 * K, D), torch.tensor([3, 30, 0, T - 1])
    seen, last = [], []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.blocks[-1].register_forward_hook(lambda module, args, out: last.append(out[0]))
    with torch.no_grad():
        out = model(x_t, t, text_emb, text_enc, text_mask)
        row, copy = 1, 0  # its suffix is row b * K + k of x_t and t
        steps = t[row * K + copy] * torch.exp(-math.log(10000) * torch.arange(M // 2) / (M // 2))
        time = model.time(torch.cat([steps.cos(), steps.sin()]))
        caption = model.prefix.text_enc_in(text_enc[row])  # (L, M)
        pooled = model.prefix.text_emb_in(text_emb[row] * math.sqrt(D))[None]
        prefix = torch.cat([caption, pooled]) + model.prefix.position
        noised = model.noised_in(x_t[row * K + copy])
        suffix = torch.stack([time, noised, model.query]) + model.position
        assert_close(seen[0][row, : L + 4], torch.cat([prefix, suffix]), rtol=0, atol=1e-5)
        at_query = model.out(model.norm(last[0][row, L + 3]))
    assert_close(out[row * K + copy], at_query, rtol=0, atol=1e-6)


# --- one prefix, many uses ------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 20, T - 1])
def test_cached_step_equals_the_whole_sequence(t):
    model, text = make_prior(), captions([L, 3, 1, 5])
    keep = yes(1, 1, 0, 0)
    x_t, t = torch.randn(4, D), torch.full((4,), t)
    with torch.no_grad():
        whole = model(x_t, t, *text, keep=keep)
        cached = model.cached_network(x_t, t, **model.encode_caption(*text, keep))
    assert_close(cached, whole, rtol=0, atol=1e-5)


def test_copies_on_one_prefix_equal_separate_passes():
    model, text, K = make_prior(), captions([L, 3, 5]), 4
    keep = yes(1, 1, 0)
    x_t, t = torch.randn(3 * K, D), torch.randint(0, T, (3 * K,))
    with torch.no_grad():
        together = model(x_t, t, *text, keep=keep)
        one_by_one = [model(x_t[k::K], t[k::K], *text, keep=keep) for k in range(K)]
    assert_close(together, torch.stack(one_by_one, 1).flatten(0, 1), rtol=0, atol=1e-5)


def test_copies_do_not_see_one_another():
    model, text, K = make_prior(), captions([L]), 3
    x_t = torch.randn(K, D, requires_grad=True)
    out = model(x_t, torch.tensor([5, 20, 40]), *text)
    for k in range(K):
        (gradient,) = torch.autograd.grad(out[k].sum(), x_t, retain_graph=True)
        others = [j for j in range(K) if j != k]
        assert gradient[k].abs().sum() > 1e-3
        assert_close(gradient[others], torch.zeros(K - 1, D), rtol=0, atol=0)


# --- padding and dropping -------------------------------------------------------------------


def test_prior_ignores_padding_tokens():
    model, (text_emb, text_enc, text_mask) = make_prior(), captions([L, 3, 1])
    junk = torch.where(text_mask[..., None], text_enc, 10 * torch.randn_like(text_enc))
    real = torch.where(text_mask[..., None], 10 * torch.randn_like(text_enc), text_enc)
    x_t, t = torch.randn(3, D), torch.tensor([1, 20, 40])

    def both_ways(text_enc):
        cached = model.cached_network(x_t, t, **model.encode_caption(text_emb, text_enc, text_mask))
        return torch.stack([model(x_t, t, text_emb, text_enc, text_mask), cached])

    with torch.no_grad():
        assert_close(both_ways(junk), both_ways(text_enc), rtol=0, atol=1e-5)
        assert (both_ways(real) - both_ways(text_enc)).abs().amax(-1).min() > 1e-3


def test_dropping_takes_away_the_whole_caption_and_nothing_else():
    model, text, other = make_prior(), captions([L, 3, 5]), captions([2, L, 1])
    x_t, t = torch.randn(3, D), torch.tensor([1, 20, 40])
    no, ones = yes(0, 0, 0), yes(1, 1, 1)

    def answer(x_t=x_t, t=t, text=text, keep=no):
        return model(x_t, t, *text, keep=keep)

    with torch.no_grad():
        assert_close(answer(text=other), answer(), rtol=0, atol=1e-5)
        # Seen elsewhere: without the noised embedding, guidance fails above 1.
        assert (answer(x_t=torch.randn(3, D)) - answer()).abs().amax(1).min() > 1e-3
        assert (answer(t=t + 5) - answer()).abs().amax(1).min() > 1e-3
        for part in range(2):  # a kept caption enters by its pooled embedding and by its tokens
            changed = [b if k == part else a for k, (a, b) in enumerate(zip(text, other))]
            difference = answer(text=changed, keep=ones) - answer(keep=ones)
            assert difference.abs().amax(1).min() > 1e-3
        model.prefix.null_text_emb.add_(1)
        difference = answer() - answer(keep=ones)
        assert difference.abs().amax(1).min() > 1e-3


def test_null_text_embedding_is_learned_from_dropped_examples_only():
    model, text = make_prior(), captions([L, 3])
    null, x_t, t = model.prefix.null_text_emb, torch.randn(2, D), torch.tensor([5, 20])
    kept, dropped = (
        torch.autograd.grad(model(x_t, t, *text, keep=keep).square().sum(), null)[0]
        for keep in (yes(1, 1), yes(1, 0))
    )
    assert_close(kept, torch.zeros(D), rtol=0, atol=0)
    assert dropped.abs().max() > 1e-3


def test_rows_without_any_token_give_no_nan():
    model, (text_emb, text_enc, text_mask) = make_prior(), captions([0, 0, 3])
    batch = dict(image_emb=unit(3, D), text_emb=text_emb, text_enc=text_enc, text_mask=text_mask)
    out = model(
        torch.randn(3, D), torch.tensor([0, 20, T - 1]), text_emb, text_enc, text_mask, yes(0, 1, 0)
    )
    assert out.isfinite().all()
    model.loss(batch).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.sample(text_emb, text_enc, text_mask, scale=2).isfinite().all()


def drop_decisions(model, monkeypatch, B):
    """The `keep` of one training batch of B examples."""
    seen = []

    def forward(x_t, t, *text, keep):
        seen.append(keep)
        return torch.zeros_like(x_t)

    monkeypatch.setattr(model, "forward", forward)
    text = dict(zip(("text_emb", "text_enc", "text_mask"), captions([1] * B)))
    model.loss({"image_emb": unit(B, D), **text})
    return seen[0]


def test_caption_is_dropped_at_the_configured_rate(monkeypatch):
    B, rate = 4000, PriorConfig(D, W, L).drop_text
    assert rate == 0.1  # paper sec. 2.2
    keep = drop_decisions(make_prior(copies=1, drop_text=rate), monkeypatch, B)
    sigma = math.sqrt(rate * (1 - rate) / B)
    assert keep.shape == (B,)  # a decision per example
    assert abs((~keep).float().mean() - rate) < 3 * sigma


def test_drop_rates_zero_and_one_are_exact(monkeypatch):
    B = 3000
    for rate in (0.0, 1.0):
        keep = drop_decisions(make_prior(copies=1, drop_text=rate), monkeypatch, B)
        assert_close(keep, torch.full((B,), rate == 0.0))


# --- guidance -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_goes_from_no_caption_at_0_to_the_caption_at_1_and_beyond(monkeypatch, scale):
    model, text = make_prior(), captions([L, 3, 5])
    x_t, t = torch.randn(3, D), torch.tensor([30, 30, 30])
    with torch.no_grad():
        cond, uncond = (model(x_t, t, *text, keep=k) for k in (yes(1, 1, 1), yes(0, 0, 0)))
    only_call(monkeypatch, model, x_t, t)
    guided = model.sample(*text, scale=scale, candidates=1)
    wanted = {0.0: uncond, 1.0: cond, 3.0: 3 * cond - 2 * uncond}[scale]
    assert_close(guided, F.normalize(wanted, dim=-1), rtol=0, atol=1e-5)


# --- the embedding's scale and the loss -----------------------------------------------------


@pytest.mark.parametrize("dim", [64, 512, 768, 1024])
def test_scaled_unit_embeddings_have_rms_of_0_54(dim):
    rms = (unit(10, dim) * embedding_scale(dim)).square().mean(1).sqrt()
    assert_close(rms, torch.full((10,), 17.2 / 32), rtol=0, atol=1e-5)
    assert abs(rms.mean() - 0.54) < 0.005  # the paper's 17.2 at 1024 dimensions


def test_loss_of_an_answer_of_zero_is_the_mean_square_of_scaled_embeddings(monkeypatch):
    model = make_prior()
    monkeypatch.setattr(model, "forward", lambda x_t, t, *text, keep: torch.zeros_like(x_t))
    text = dict(zip(("text_emb", "text_enc", "text_mask"), captions([4] * 5)))
    loss = model.loss({"image_emb": unit(5, D), **text})
    assert_close(loss, torch.tensor(17.2**2 / 1024), rtol=0, atol=1e-5)


def test_loss_does_not_scale_the_batchs_embeddings_in_place():
    model = make_prior(drop_text=0.0)
    text = dict(zip(("text_emb", "text_enc", "text_mask"), captions([L, 3])))
    batch = {"image_emb": unit(2, D), **text}
    before = {name: value.clone() for name, value in batch.items()}
    model.loss(batch)  # seen elsewhere: cached embeddings scaled at each use
    for name in batch:
        assert_close(batch[name], before[name], rtol=0, atol=0)


def test_training_shows_k_copies_of_each_embedding_each_at_its_own_t(monkeypatch):
    B, K = 200, 3
    model, image_emb, seen = make_prior(copies=K), unit(B, D), []

    def oracle(x_t, t, *text, keep):
        seen.append((x_t, t))
        return (image_emb * embedding_scale(D)).repeat_interleave(K, 0)

    monkeypatch.setattr(model, "forward", oracle)
    text = dict(zip(("text_emb", "text_enc", "text_mask"), captions([4] * B)))
    assert_close(
        model.loss({"image_emb": image_emb, **text}), torch.tensor(0.0), rtol=0, atol=1e-10
    )
    (x_t, t), alpha_bar = seen[0], model.diffusion.alphas_cumprod
    assert (t.view(B, K)[:, 0] != t.view(B, K)[:, 1]).float().mean() > 0.9
    signal, sigma = alpha_bar[t].sqrt().float()[:, None], (1 - alpha_bar[t]).sqrt().float()[:, None]
    noise = (x_t - signal * oracle(x_t, t, keep=None)) / sigma  # DDPM eq. 4 solved for it
    covariance = noise.view(B, K * D).T @ noise.view(B, K * D) / B  # independent in each copy
    assert (covariance - torch.eye(K * D)).abs().max() < 5.5 / math.sqrt(B)


def test_prior_learns_to_read_the_text_embedding():
    model = make_prior(depth=1, copies=8, drop_text=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        image_emb = unit(16, D)
        _, text_enc, text_mask = captions([1] * 16)
        batch = dict(
            image_emb=image_emb, text_emb=image_emb, text_enc=0 * text_enc, text_mask=text_mask
        )
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Without the caption, no network beats the best guess from x_t alone: for N(0, s^2) data,
    # s^2 (1 - alpha_bar) / (alpha_bar s^2 + 1 - alpha_bar).
    alpha_bar, s_2 = model.diffusion.alphas_cumprod, 17.2**2 / 1024
    blind = (s_2 * (1 - alpha_bar) / (alpha_bar * s_2 + 1 - alpha_bar)).mean()
    assert sum(losses[-10:]) / 10 < 0.8 * blind


# --- sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["x_0", "noise"])
def test_sampling_with_an_oracle_returns_its_embedding(monkeypatch, predict):
    model, text, candidates = make_prior(predict=predict), captions([L, 3, 5]), 2
    # Scaled, its largest entry is 2: an embedding is not a picture, and must not be clipped at 1.
    target = F.normalize(torch.randn(3, D) + 4 * torch.eye(3, D), dim=-1)
    scaled = (target * embedding_scale(D)).repeat_interleave(candidates, 0)
    assert scaled.abs().max() > 1.5

    def oracle(x_t, t, cache, key_mask):
        alpha_bar = model.diffusion.alphas_cumprod[t].float()[:, None]
        return (
            scaled
            if predict == "x_0"
            else (x_t - alpha_bar.sqrt() * scaled) / (1 - alpha_bar).sqrt()
        )

    monkeypatch.setattr(model, "cached_network", oracle)
    assert_close(model.sample(*text, candidates=candidates), target, rtol=0, atol=1e-4)


def test_samples_have_unit_norm():
    sample = make_prior().sample(*captions([L, 3, 5]), scale=2)
    assert_close(sample.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


def test_sampling_takes_the_configured_steps_or_those_asked_for():
    assert PriorConfig(D, W, L).sample_steps == 64  # paper table 3
    for steps, wanted in ((None, TINY["sample_steps"]), (4, 4)):
        visited = []
        make_prior().sample(
            *captions([L]), steps=steps, on_step=lambda k, t, x, x_0: visited.append(t)
        )
        assert len(visited) == wanted and visited[0] == T - 1 and visited[-1] == 0


def test_an_embedding_drawn_in_a_batch_equals_the_one_drawn_alone():
    model, text = make_prior(), captions([L, 3, 5])
    together = model.sample(*text, scale=2, generators=seeds([7, 8, 9]))
    for k in range(3):
        alone = model.sample(*(x[k : k + 1] for x in text), scale=2, generators=seeds([7 + k]))
        assert_close(together[k], alone[0], rtol=0, atol=1e-5)
    other = model.sample(*text, scale=2, generators=seeds([17, 18, 19]))
    assert (other - together).abs().amax(1).min() > 1e-4


def test_rerank_finds_a_planted_winner_in_each_row():
    text_emb, image_emb, winners = unit(4, D), unit(4, 5, D), torch.tensor([2, 0, 4, 1])
    rows = torch.arange(4)
    image_emb[rows, winners] = F.normalize(text_emb + 0.1 * unit(4, D), dim=-1)
    image_emb[rows, (winners + 1) % 5] = text_emb.roll(1, 0)  # another caption's best
    assert_close(rerank(image_emb, text_emb), image_emb[rows, winners], rtol=0, atol=0)


def test_sample_keeps_each_captions_best_candidate(monkeypatch):
    model, text, C = make_prior(), captions([L, 3, 5]), 4
    winners = torch.tensor([3, 0, 2])
    drawn = torch.randn(3, C, D)
    drawn[torch.arange(3), winners] = 5 * text[0] + 0.1 * torch.randn(3, D)
    # What diffusion returns: all candidates of the first caption, then all of the second, ...
    monkeypatch.setattr(model.diffusion, "sample", lambda *args, **kw: drawn.flatten(0, 1))
    wanted = F.normalize(drawn[torch.arange(3), winners], dim=-1)
    assert_close(model.sample(*text, candidates=C), wanted, rtol=0, atol=1e-6)


def test_candidates_are_different_draws_for_the_same_caption():
    model, text, shapes = make_prior(), captions([L, 3]), []
    drawn = model.diffusion.sample

    def sample(network, shape, **kw):
        shapes.append(shape)
        x_0 = drawn(network, shape, **kw)
        candidates = F.normalize(x_0, dim=-1).view(2, 2, D)
        assert (candidates[:, 0] - candidates[:, 1]).abs().amax(1).min() > 1e-4
        return x_0

    model.diffusion.sample = sample
    model.sample(*text, generators=seeds([1, 2]))  # two by default (paper sec. 2.2)
    assert shapes == [(4, D)]


def test_caches_can_be_stacked_along_the_batch():
    model = make_prior()
    tokens, mask = torch.randn(3, 5, M), causal_mask(torch.ones(3, 5, dtype=torch.bool))
    with torch.no_grad():
        _, together = run_blocks(model.blocks, tokens, mask)
        alone = [run_blocks(model.blocks, tokens[k : k + 1], mask[k : k + 1])[1] for k in range(3)]
    assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_finish_measures_the_analytic_variance_of_this_network_and_data():
    model = make_prior()
    text_emb, text_enc, text_mask = captions([3] * 40)
    batch = {"image_emb": unit(40, D), "text_emb": text_emb, "text_enc": text_enc,
             "text_mask": text_mask}
    assert not model.diffusion.x_0_variance.any()
    model.finish(batch)
    # At the noisiest level, by hand: the whole sequence, and its mean squared error.
    x_0 = batch["image_emb"] * embedding_scale(D)
    t = torch.full((40,), T - 1)
    with torch.no_grad():
        out = model(torch.randn(40, D), t, text_emb, text_enc, text_mask)
    by_hand = (out - x_0).square().mean().double()
    assert_close(model.diffusion.x_0_variance[-1], by_hand, rtol=0.1, atol=0)


def test_captions_padded_to_less_than_clips_length_give_the_same_prefix():
    model = make_prior()
    text_emb, text_enc, text_mask = captions([2, 4])
    x_t, t = torch.randn(2, D), torch.tensor([3, 30])
    long = model(x_t, t, text_emb, text_enc, text_mask)
    assert_close(model(x_t, t, text_emb, text_enc[:, :4], text_mask[:, :4]), long)


def test_attention_on_a_cpu_is_the_fused_one_of_gpus():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.rand(2, 1, 5, 9) < 0.5
    mask[..., 0] = True  # no query without a key
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(attention(q, k, v, mask), fused)
