"""Claims about the decoder: its two pathways, dropping, guidance, attention, U-Net and sampling."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from decoder import Decoder, DecoderConfig, IMAGE_TOKENS
from networks import Attention, ResBlock, TimeEmbedding, UNet, group_norm
from support.sheets import to_pil

D, W, L, X, T = 16, 12, 8, 32, 50
TINY = DecoderConfig(
    dim=D, text_width=W, text_len=L, size=16, channels=8, multiples=(1, 2), attention_levels=(1,),
    head_channels=8, context_width=X, text_depth=1, diffusion_steps=T, sample_steps=4,
)
E = 4 * TINY.channels


pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def randomise(model):
    """Fresh U-Nets answer zero; give every weight a value, so that the answer depends on them."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.7 / max(1, p[0].numel()) ** 0.5)
    return model.eval()


def make_decoder(**changes):
    return randomise(Decoder(replace(TINY, **changes)))


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def captions(lengths):
    """text_enc, text_mask of captions with so many real tokens each."""
    return torch.randn(len(lengths), L, W), torch.arange(L) < torch.tensor(lengths)[:, None]


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def seeds(numbers):
    return [torch.Generator().manual_seed(k) for k in numbers]


def noised(B, size=16):
    return torch.randn(B, 3, size, size), torch.tensor([3, 20, 40, 49])[:B]


def differs(a, b):
    """Every example of the one is another in the other."""
    return (a - b).flatten(1).abs().amax(1).min() > 1e-4


# --- the U-Net's parts ----------------------------------------------------------------------


def test_attention_is_one_softmax_over_context_and_pixels():
    C, heads, B, N, H = 16, 2, 2, 5, 3
    layer = randomise(Attention(C, C // heads, X)).double()
    x, context = torch.randn(B, C, H, H).double(), torch.randn(B, N, X).double()
    mask = flags(1, 1, 0, 1, 0, 1, 1, 1, 1, 0).view(B, N)
    wanted = x.clone()
    for b in range(B):  # the plain way: one head, one list of things to look at, no batches
        group = F.group_norm(
            x[b : b + 1], group_norm(C).num_groups, layer.norm.weight, layer.norm.bias
        )
        pixels = group[0].permute(1, 2, 0).reshape(H * H, C)
        q, k, v = (
            pixels @ w.T + c for w, c in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3))
        )
        tokens = context[b, mask[b]]  # masked tokens do not exist at all
        halves = zip(layer.context_kv.weight.chunk(2), layer.context_kv.bias.chunk(2))
        context_k, context_v = (tokens @ w.T + c for w, c in halves)
        k, v = torch.cat([context_k, k]), torch.cat([context_v, v])
        y = []
        for h in range(heads):
            part = slice(h * C // heads, (h + 1) * C // heads)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(C / heads)).softmax(dim=1)
            y.append(weights @ v[:, part])
        wanted[b] += layer.out(torch.cat(y, dim=1)).T.view(C, H, H)
    assert_close(layer(x, context, mask), wanted, rtol=0, atol=1e-10)


def test_residual_block_is_scaled_and_shifted_by_the_embedding():
    block = randomise(ResBlock(8, 16, E))
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, E)
    h = F.conv2d(F.silu(block.norm_1(x)), block.conv_1.weight, block.conv_1.bias, padding=1)
    per_channel = F.silu(emb) @ block.emb.weight.T + block.emb.bias
    h = h.view(2, -1, 2 * 16 * 36 // block.norm_2.num_groups // 2)  # (B, groups, a group's numbers)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = h.view(2, 16, 6, 6) * block.norm_2.weight[:, None, None] + block.norm_2.bias[:, None, None]
    h = h * (1 + per_channel[:, :16, None, None]) + per_channel[:, 16:, None, None]
    wanted = block.skip(x) + F.conv2d(F.silu(h), block.conv_2.weight, block.conv_2.bias, padding=1)
    assert_close(block(x, emb), wanted, rtol=0, atol=1e-5)


def test_group_norm_is_done_in_float32_whatever_the_network_runs_in(monkeypatch):
    seen, real = [], F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: seen.append(x.dtype) or real(x, *rest))
    layer, x = randomise(group_norm(16)), 3 + 5 * torch.randn(2, 16, 4, 4)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        out = layer.to(torch.promote_types(dtype, torch.float32))(x.to(dtype))
        assert out.dtype == dtype
        parts = x.to(dtype).double().view(2, layer.num_groups, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / parts.std(2, keepdim=True, unbiased=False)
        wanted = parts.view_as(x) * layer.weight[:, None, None] + layer.bias[:, None, None]
        tolerance = 0.01 if dtype == torch.bfloat16 else 1e-4
        assert_close(out.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    assert seen == [torch.float32, torch.float32, torch.float64]


def test_fresh_residual_branches_and_fresh_decoders_answer_exactly_zero():
    x, emb, context = torch.randn(2, 8, 4, 4), torch.randn(2, E), torch.randn(2, 3, X)
    assert_close(ResBlock(8, 8, E)(x, emb), x, rtol=0, atol=0)
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert_close(Attention(8, 8, X)(x, context, everything), x, rtol=0, atol=0)
    model, (x_t, t) = Decoder(TINY), noised(2)
    cond = model.condition(unit(2, D), *captions([3, L]), flags(1, 1), flags(1, 1))
    assert_close(model(x_t, t, **cond), torch.zeros(2, 6, 16, 16), rtol=0, atol=0)


def test_every_part_of_the_unet_is_used():
    model = make_decoder()
    x_t, t = noised(2)
    cond = model.condition(unit(2, D), *captions([3, L]), flags(1, 0), flags(1, 0))
    model(x_t, t, **cond).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_each_step_up_sees_the_output_of_its_step_down():
    unet = randomise(UNet(3, 5, channels=8, multiples=(1, 2), blocks=1, emb_dim=E))
    x, emb = torch.randn(2, 3, 8, 8), torch.randn(2, E)
    res = [level.res for level in (*unet.down, *unet.middle, *unet.up) if hasattr(level, "res")]
    a = unet.conv_in(x)  # (2, 8, 8, 8)
    b = res[0](a, emb)
    c = unet.down[1](b)  # (2, 8, 4, 4)
    d = res[1](c, emb)  # (2, 16, 4, 4)
    y = res[3](res[2](d, emb), emb)  # across
    y = res[4](torch.cat([y, d], 1), emb)
    y = res[5](torch.cat([y, c], 1), emb)
    y = unet.up[2](y.repeat_interleave(2, 2).repeat_interleave(2, 3))  # (2, 8, 8, 8)
    y = res[6](torch.cat([y, b], 1), emb)
    y = res[7](torch.cat([y, a], 1), emb)
    wanted = unet.conv_out(F.silu(unet.norm_out(y)))
    assert_close(unet(x, emb), wanted, rtol=0, atol=1e-5)
    assert (unet.up[2].in_channels, unet.up[2].out_channels) == (16, 8)


def space_to_depth(x):
    """pixel_unshuffle by 2, written out: each 2 x 2 patch becomes four channels."""
    return torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2).flatten(1, 2)


def test_stem_of_two_is_the_same_network_on_patches_of_two_by_two():
    shape = dict(channels=8, multiples=(1, 2), blocks=1, emb_dim=E)
    with_stem = randomise(UNet(3, 5, **shape, stem=2))
    plain = UNet(3 * 4, 5 * 4, **shape).eval()
    plain.load_state_dict(with_stem.state_dict())
    x, emb = torch.randn(2, 3, 16, 16), torch.randn(2, E)
    assert_close(
        space_to_depth(with_stem(x, emb)), plain(space_to_depth(x), emb), rtol=0, atol=1e-5
    )


def test_unet_without_attention_levels_has_no_attention():
    shape = dict(channels=8, multiples=(1, 2), blocks=1, emb_dim=E)
    assert not any(isinstance(m, Attention) for m in UNet(3, 3, **shape).modules())


def test_decoder_attends_at_16_and_8_pixels_by_default():
    config = DecoderConfig(D, W, L)
    model = Decoder(
        replace(TINY, multiples=config.multiples, attention_levels=config.attention_levels)
    )
    sides = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda module, args: sides.append(args[0].shape[-1]))
    with torch.no_grad():
        model.sample(unit(1, D), size=config.size, steps=1)
    assert sides == [16, 8, 8, 8, 8, 16, 16]  # down, in the middle, and two a level going up


# --- what the U-Net is told -----------------------------------------------------------------


def test_timestep_changes_the_answer():
    model, (x_t, t) = make_decoder(), noised(3)
    cond = model.condition(unit(3, D), *captions([L, 3, 5]), flags(1, 1, 1), flags(1, 1, 1))
    with torch.no_grad():
        assert differs(model(x_t, t, **cond), model(x_t, t + 5 - 10 * (t > 40), **cond))


def test_time_embedding_is_a_network_of_sines_and_cosines():
    module, t = TimeEmbedding(8, E), torch.tensor([0, 7, 49])
    angles = t[:, None] * torch.tensor([10000 ** (-k / 4) for k in range(4)])
    wanted = module.net(torch.cat([angles.cos(), angles.sin()], dim=1))
    assert_close(module(t), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("closed", ["neither", "image_to_tokens", "image_to_time", "both"])
def test_image_embedding_acts_by_the_timestep_and_by_four_tokens(closed):
    model, (x_t, t), text = make_decoder(), noised(3), captions([L, 3, 5])
    for name in ("image_to_tokens", "image_to_time"):
        if closed in (name, "both"):
            getattr(model, name).weight.data.zero_()
    with torch.no_grad():
        one, other = (
            model(x_t, t, **model.condition(emb, *text, flags(1, 1, 1), flags(1, 1, 1)))
            for emb in (unit(3, D), unit(3, D))
        )
    if closed == "both":
        assert_close(one, other, rtol=0, atol=0)
    else:
        assert differs(one, other)


def test_embedding_and_end_of_text_are_added_to_the_timestep():
    model, (x_t, t), (text_enc, text_mask) = make_decoder(), noised(3), captions([L, 3, 1])
    image_emb, told = unit(3, D), []
    model.unet.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    with torch.no_grad():
        cond = model.condition(image_emb, text_enc, text_mask, flags(1, 0, 1), flags(1, 1, 0))
        model(x_t, t, **cond)
        tokens = cond["context"][:, IMAGE_TOKENS:]
        image = torch.stack([image_emb[0], model.null_image_emb, image_emb[2]])
        # Example 0 ends with its token 7, example 1 with its token 2, example 2 has no caption.
        text = torch.stack(
            [model.text_to_time(tokens[0, 7]), model.text_to_time(tokens[1, 2]), model.null_caption]
        )
        wanted = model.time(t) + model.image_to_time(image * math.sqrt(D)) + text
    assert_close(told[0], wanted, rtol=0, atol=1e-5)


def test_a_hidden_layer_of_the_embedding_comes_before_both_pathways():
    plain, model = make_decoder(), make_decoder(image_hidden=24, emb_width=40)
    assert plain.unet.down[0].res.emb.in_features == 4 * TINY.channels  # ADM's width
    assert model.unet.down[0].res.emb.in_features == 40
    image_emb, (text_enc, text_mask) = unit(2, D), captions([L, 3])
    with torch.no_grad():
        cond = model.condition(image_emb, text_enc, text_mask, flags(1, 0), flags(0, 0))
        seen = torch.stack([image_emb[0], model.null_image_emb]) * math.sqrt(D)
        first = model.image_in[0]
        hidden = F.silu(seen @ first.weight.T + first.bias)  # (2, 24)
        wanted = model.image_to_time(hidden) + model.null_caption
        assert_close(cond["cond_emb"], wanted, rtol=0, atol=1e-5)
        wanted = model.image_to_tokens(hidden).view(2, IMAGE_TOKENS, X)
        assert_close(cond["context"][:, :IMAGE_TOKENS], wanted, rtol=0, atol=1e-5)


def test_four_tokens_of_the_embedding_precede_those_of_the_caption():
    model, image_emb, (text_enc, text_mask) = make_decoder(), unit(3, D), captions([L, 3, 5])
    yes = flags(1, 1, 1)
    with torch.no_grad():
        cond = model.condition(image_emb, text_enc, text_mask, yes, flags(1, 1, 0))
        assert cond["context"].shape == (3, 4 + L, X)
        for k in range(4):  # each token is its own projection of the whole embedding
            rows = slice(k * X, (k + 1) * X)
            weight, bias = model.image_to_tokens.weight[rows], model.image_to_tokens.bias[rows]
            wanted = image_emb * math.sqrt(D) @ weight.T + bias
            assert_close(cond["context"][:, k], wanted, rtol=0, atol=1e-5)
        other = model.condition(unit(3, D), text_enc, text_mask, yes, yes)
    assert_close(other["context"][:, 4:], cond["context"][:, 4:], rtol=0, atol=0)
    real = text_mask & flags(1, 1, 0)[:, None]  # a dropped caption is not looked at
    wanted = torch.cat([torch.ones(3, 4, dtype=torch.bool), real], dim=1)
    assert_close(cond["context_mask"], wanted)


def test_padding_tokens_of_the_caption_are_ignored():
    # In float64: one token among many pixels does little.
    model, (x_t, t), (text_enc, text_mask) = make_decoder().double(), noised(3), captions([L, 3, 1])
    emb, text_enc, yes = unit(3, D).double(), text_enc.double(), flags(1, 1, 1)

    def answer(text_enc):
        return model(x_t.double(), t, **model.condition(emb, text_enc, text_mask, yes, yes))

    with torch.no_grad():  # seen elsewhere: features behind the end are junk
        junk = torch.where(text_mask[..., None], text_enc, 10 * torch.randn_like(text_enc))
        before = answer(text_enc)
        assert_close(answer(junk), before, rtol=0, atol=1e-10)
        for k, length in enumerate((L, 3, 1)):  # every real token counts
            for j in range(length):
                changed = text_enc.clone()
                changed[k, j] += torch.randn(W)
                assert (answer(changed) - before)[k].abs().max() > 1e-7


def test_masked_context_is_ignored_and_shown_context_is_not():
    model, (x_t, t) = make_decoder(), noised(2)
    cond = model.condition(unit(2, D), *captions([3, 5]), flags(1, 1), flags(1, 0))
    change = torch.randn_like(cond["context"])
    hidden = torch.where(cond["context_mask"][..., None], 0, change)
    with torch.no_grad():
        before = model(x_t, t, **cond)
        same = model(x_t, t, **cond | {"context": cond["context"] + hidden})
        changed = model(x_t, t, **cond | {"context": cond["context"] + change - hidden})
    assert_close(same, before, rtol=0, atol=1e-5)
    assert differs(changed, before)


# --- dropping -------------------------------------------------------------------------------


def test_dropped_conditions_do_not_act_and_kept_ones_do():
    model, (x_t, t) = make_decoder(), noised(4)
    (emb, text), (other_emb, other_text) = ((unit(4, D), captions([L, 3, 5, 2])) for _ in range(2))
    keep_emb, keep_text = flags(1, 1, 0, 0), flags(1, 0, 1, 0)
    with torch.no_grad():
        before, by_emb, by_text = (
            model(x_t, t, **model.condition(e, *c, keep_emb, keep_text))
            for e, c in ((emb, text), (other_emb, text), (emb, other_text))
        )
    assert_close(by_emb[~keep_emb], before[~keep_emb], rtol=0, atol=0)
    assert_close(by_text[~keep_text], before[~keep_text], rtol=0, atol=1e-6)
    assert differs(by_emb[keep_emb], before[keep_emb])
    assert differs(by_text[keep_text], before[keep_text])


def drop_decisions(model, monkeypatch, B):
    """keep_image_emb and keep_caption of one training batch of B examples."""
    seen = []

    def condition(image_emb, text_enc, text_mask, keep_image_emb, keep_caption):
        seen.append((keep_image_emb, keep_caption))
        return {}

    monkeypatch.setattr(model, "condition", condition)
    monkeypatch.setattr(model, "forward", lambda x_t, t: torch.zeros_like(x_t))
    text_enc, text_mask = captions([1] * B)
    picture = torch.zeros(B, 3, 1, 1) - 0.5
    model.loss(dict(image=picture, image_emb=unit(B, D), text_enc=text_enc, text_mask=text_mask))
    return seen[0]


def test_embedding_and_caption_are_dropped_at_their_rates_independently(monkeypatch):
    B, config = 20000, DecoderConfig(D, W, L)
    assert (config.drop_image_emb, config.drop_caption) == (0.1, 0.5)  # paper sec. 2.1
    model = make_decoder(variance="fixed_small")
    keep_image_emb, keep_caption = drop_decisions(model, monkeypatch, B)
    counts = {
        0.1: ~keep_image_emb,
        0.5: ~keep_caption,
        0.05: ~keep_image_emb & keep_caption,  # paper fig. 8: the caption alone
        0.45: keep_image_emb & keep_caption,
    }
    for rate, dropped in counts.items():
        assert dropped.shape == (B,)  # a decision per example
        sigma = math.sqrt(rate * (1 - rate) / B)
        assert abs(dropped.float().mean() - rate) < 3 * sigma


@pytest.mark.parametrize("image_rate, caption_rate", [(0.0, 1.0), (1.0, 0.0)])
def test_drop_rates_zero_and_one_are_exact(monkeypatch, image_rate, caption_rate):
    rates = dict(drop_image_emb=image_rate, drop_caption=caption_rate)
    model, B = make_decoder(variance="fixed_small", **rates), 3000
    keep_image_emb, keep_caption = drop_decisions(model, monkeypatch, B)
    assert_close(keep_image_emb, torch.full((B,), image_rate == 0))
    assert_close(keep_caption, torch.full((B,), caption_rate == 0))


def test_null_embedding_and_null_caption_are_learned_from_dropped_examples_only():
    model, (x_t, t), text, emb = make_decoder(), noised(2), captions([L, 3]), unit(2, D)
    nulls = [model.null_image_emb, model.null_caption]
    for keep in (flags(1, 1), flags(1, 0)):
        out = model(x_t, t, **model.condition(emb, *text, keep, keep))
        for gradient in torch.autograd.grad(out.square().sum(), nulls):
            assert bool(gradient.any()) == (not keep.all())


def test_a_missing_condition_is_a_dropped_one():
    model, (x_t, t), text, emb = make_decoder(), noised(2), captions([L, 3]), unit(2, D)
    yes, no = flags(1, 1), flags(0, 0)
    with torch.no_grad():
        for given, keep in (
            ((emb, None, None), (yes, no)),
            ((None, *text), (no, yes)),
            ((emb, *text), (yes, yes)),
        ):
            wanted = model(x_t, t, **model.condition(emb, *text, *keep))
            assert_close(model.network(*given)(x_t, t), wanted, rtol=0, atol=1e-5)


# --- guidance -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_goes_from_neither_condition_at_0_to_both_at_1_and_beyond(scale):
    model, (x_t, t), text, emb = make_decoder(), noised(2), captions([L, 3]), unit(2, D)
    with torch.no_grad():
        cond, uncond = (
            model(x_t, t, **model.condition(emb, *text, keep, keep))
            for keep in (flags(1, 1), flags(0, 0))
        )
        out = model.network(emb, *text, scale)(x_t, t)
    assert_close(out[:, :3], (1 - scale) * uncond[:, :3] + scale * cond[:, :3], rtol=0, atol=1e-4)
    assert_close(out[:, 3:], cond[:, 3:], rtol=0, atol=1e-5)  # the variance is not guided


def test_guidance_runs_one_batch_at_1_and_two_in_one_else():
    model, (x_t, t), sizes = make_decoder(), noised(3), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    with torch.no_grad():
        for scale in (1, 1.0, 2.0, 0.0):
            model.network(unit(3, D), *captions([L, 3, 5]), scale)(x_t, t)
    assert sizes == [3, 3, 6, 6]


# --- variance and loss ----------------------------------------------------------------------


def training_batch(B=8):
    text_enc, text_mask = captions([L, 3, 5, 1] * (B // 4))
    image = torch.rand(B, 3, 16, 16) * 2 - 1
    return dict(image=image, image_emb=unit(B, D), text_enc=text_enc, text_mask=text_mask)


@pytest.mark.parametrize(
    "variance, channels", [("learned", 6), ("fixed_small", 3), ("fixed_large", 3)]
)
def test_learned_variance_doubles_the_channels(variance, channels):
    model, (x_t, t) = make_decoder(variance=variance), noised(2)
    assert DecoderConfig(D, W, L).variance == "learned"
    with torch.no_grad():
        assert model.network(unit(2, D), None, None)(x_t, t).shape == (2, channels, 16, 16)
    if variance == "learned":  # the other three channels decide how noisy a step is
        one, other = torch.zeros(2, 6, 16, 16), torch.zeros(2, 6, 16, 16)
        one[:, 3:], other[:, 3:] = -1, 1
        one, other = (model.diffusion.p_log_variance(out, x_t, t) for out in (one, other))
        assert (one < other).all()
    assert model.diffusion.variance == variance


@pytest.mark.parametrize("t", [0, 1, 25, T - 1])
def test_loss_and_gradients_are_finite_in_bf16_at_every_noise_level(monkeypatch, t):
    model, batch = make_decoder(drop_image_emb=0.5), training_batch()
    monkeypatch.setattr(
        torch, "randint", lambda low, high, shape, device: torch.full(shape, t, device=device)
    )
    losses = []
    for enabled in (False, True):  # seen elsewhere: log-variances in half precision
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(batch))
    losses[1].backward()
    assert losses[1].dtype == torch.float32
    assert_close(losses[1], losses[0], rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_loss_of_an_answer_of_zero_is_the_mean_square_of_the_target(monkeypatch):
    model, batch = make_decoder(variance="fixed_small", predict="x_0"), training_batch()
    monkeypatch.setattr(model, "forward", lambda x_t, t, **cond: torch.zeros_like(x_t))
    assert_close(model.loss(batch), batch["image"].square().mean(), rtol=1e-5, atol=0)


# --- sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_flat_grey_pictures_keep_their_grey(monkeypatch, eta):
    model, greys = make_decoder(), torch.tensor([-0.5, 0.3, 1.0])[:, None, None, None]

    def oracle(x_t, t, **cond):
        """The v of 2202.00512 whose clean picture is flat; the variance channels say 0."""
        alpha_bar = model.diffusion.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        noise = (x_t - alpha_bar.sqrt() * greys) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * greys
        return torch.cat([v, torch.zeros_like(v)], dim=1)

    monkeypatch.setattr(model, "forward", oracle)
    # Seen elsewhere: rescaling by each picture's own min and max.
    pictures = model.sample(unit(3, D), eta=eta)
    assert_close(pictures, greys.expand(3, 3, 16, 16), rtol=0, atol=1e-4)


def test_saved_pixels_have_fixed_limits():
    picture = torch.full((3, 4, 4), -0.5)  # (-0.5 + 1) * 127.5 = 63.75
    assert_close(np.array(to_pil(picture)), np.full((4, 4, 3), 64, np.uint8))
    picture[0], picture[1, 0], picture[1, 1] = 1, -1, 7  # and what is beyond is cut, not wrapped
    wanted = np.stack([np.full((4, 4), 255), np.full((4, 4), 64), np.full((4, 4), 64)], -1)
    wanted[0, :, 1], wanted[1, :, 1] = 0, 255
    assert_close(np.array(to_pil(picture)), wanted.astype(np.uint8))


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_a_picture_drawn_in_a_batch_equals_the_one_drawn_alone(eta):
    model, emb, text = make_decoder(), unit(3, D), captions([L, 3, 5])
    together = model.sample(emb, *text, scale=2, eta=eta, generators=seeds([7, 8, 9]))
    for k in range(3):
        one = (x[k : k + 1] for x in (emb, *text))
        alone = model.sample(*one, scale=2, eta=eta, generators=seeds([7 + k]))
        assert_close(together[k], alone[0], rtol=0, atol=1e-4)
    assert differs(
        model.sample(emb, *text, scale=2, eta=eta, generators=seeds([17, 18, 19])), together
    )


def test_ddim_without_noise_depends_on_x_T_alone():
    model, emb, text = make_decoder(), unit(2, D), captions([L, 3])
    x_T = torch.randn(2, 3, 16, 16)

    def draw(seed, eta, x_T=x_T):
        torch.manual_seed(seed)
        return model.sample(emb, *text, scale=2, eta=eta, x_T=x_T)

    assert_close(draw(1, eta=0.0), draw(2, eta=0.0), rtol=0, atol=0)
    assert differs(draw(1, eta=0.0), draw(1, eta=0.0, x_T=-x_T))
    for eta in (None, 1.0):
        assert differs(draw(1, eta), draw(2, eta))
        assert differs(draw(1, eta), draw(1, eta, x_T=-x_T))


def test_sample_is_the_diffusions_sampler_on_the_guided_network():
    model, emb, text = make_decoder(), unit(2, D), captions([L, 3])
    network, shape = model.network(emb, *text, 2.0), (2, 3, 16, 16)
    draw, ddim = model.diffusion.sample, model.diffusion.ddim_sample
    for eta, wanted in (
        (None, lambda: draw(network, shape, steps=4, generators=seeds([1, 2]))),
        (0.5, lambda: ddim(network, shape, steps=4, eta=0.5, generators=seeds([1, 2]))),
    ):
        ours = model.sample(emb, *text, scale=2.0, eta=eta, generators=seeds([1, 2]))
        assert_close(ours, wanted(), rtol=0, atol=1e-5)
        assert ours.abs().max() <= 1 + 1e-5  # each predicted x_0 is clipped, the last one is drawn


@pytest.mark.parametrize("size", [32, 64])
def test_the_same_weights_draw_at_32_and_64_pixels(size):
    model, emb, visited = make_decoder(), unit(2, D), []
    for e in (emb, -emb):
        visited.append(model.sample(e, size=size, steps=3, generators=seeds([1, 2])))
    assert visited[0].shape == (2, 3, size, size) and visited[0].isfinite().all()
    assert differs(*visited)


def test_a_decoder_in_training_draws_without_dropout():
    model, emb = make_decoder(dropout=0.5), unit(1, D)
    expected = model.eval().sample(emb, steps=2, generators=seeds([1]))
    drawn = model.train().sample(emb, steps=2, generators=seeds([1]))
    assert_close(drawn, expected, rtol=0, atol=0)
    assert model.training and model.unet.training


def test_sampling_takes_the_configured_steps_or_those_asked_for():
    for steps, wanted in ((None, TINY.sample_steps), (2, 2)):
        for eta in (None, 0.0):
            visited = []
            make_decoder().sample(
                unit(1, D), steps=steps, eta=eta, on_step=lambda k, t, x, x_0: visited.append(t)
            )
            assert len(visited) == wanted and visited[0] == T - 1 and visited[-1] == 0


# --- the baselines: the same network, trained on something else


@pytest.mark.parametrize("condition", ["image_emb", "text_emb", "caption"])
def test_each_decoder_is_trained_on_its_own_condition_alone(condition):
    model = make_decoder(condition=condition, drop_image_emb=0.0, drop_caption=0.0)
    text_enc, text_mask = captions([3, 5])
    batch = {"image": 2 * torch.rand(2, 3, 16, 16) - 1, "image_emb": unit(2, D),
             "text_emb": unit(2, D), "text_enc": text_enc, "text_mask": text_mask}

    def loss(**changes):
        torch.manual_seed(0)
        return model.loss(batch | changes).item()

    for name in ("image_emb", "text_emb"):
        changed = loss(**{name: unit(2, D)}) != loss()
        assert changed == (name == condition)
    assert loss(text_enc=torch.randn_like(text_enc)) != loss()


def test_glide_never_sees_an_embedding_but_learns_the_null_one():
    model = make_decoder(condition="caption", drop_image_emb=0.0)
    text_enc, text_mask = captions([3, 5])
    batch = {"image": 2 * torch.rand(2, 3, 16, 16) - 1, "image_emb": unit(2, D).requires_grad_(),
             "text_enc": text_enc, "text_mask": text_mask}
    model.loss(batch).backward()
    assert not batch["image_emb"].grad.any() and model.null_image_emb.grad.abs().sum() > 0


def test_a_stem_folds_pixels_into_channels_and_back():
    """With a stem of 2 a 16 x 16 picture costs the convolutions what one of 8 x 8 costs."""
    sides = []
    model = make_decoder(stem=2)
    model.unet.conv_in.register_forward_hook(lambda m, inputs, out: sides.append(out.shape))
    text_enc, text_mask = captions([3])
    x_t, t = noised(1)
    yes = flags(True)
    out = model(x_t, t, **model.condition(unit(1, D), text_enc, text_mask, yes, yes))
    assert out.shape == (1, 6, 16, 16) and sides[0][2:] == (8, 8)
