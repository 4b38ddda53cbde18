"""Claims about the decoder: its two pathways, dropping, guidance, its baselines and sampling."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from decoder import Decoder, DecoderConfig, IMAGE_TOKENS
from diffusion import SeededNoise
from helpers import (
    D, FakeBatches, L, T, W, batch_of, captions, differs, flags, pictures, randomise, unit,
)
from networks import Attention

X, SIZE = 32, 16
TINY = DecoderConfig(
    dim=D, text_width=W, text_len=L, size=SIZE, channels=8, multiples=(1, 2), attention_levels=(1,),
    head_channels=8, context_width=X, text_depth=1, diffusion_steps=T, sample_steps=4,
)
YES, NO = flags(1, 1, 1), flags(0, 0, 0)

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def make_decoder(**changes):
    return randomise(Decoder(replace(TINY, **changes)))


def case(**changes):
    """A decoder, noised pictures and noise levels, an embedding and (text_enc, text_mask)."""
    x_t, t = torch.randn(3, 3, SIZE, SIZE), torch.tensor([3, 20, T - 1])
    return make_decoder(**changes), (x_t, t), unit(3, D), captions([L, 3, 1])[1:]


def answer(model, noised, emb, text, keep_emb=YES, keep_text=YES):
    with torch.no_grad():
        return model(*noised, **model.condition(emb, *text, keep_emb, keep_text))


# --- what the U-Net is told -----------------------------------------------------------------------


def test_every_part_is_used_and_a_fresh_decoder_answers_zero():
    model, noised, emb, text = case()
    model(*noised, **model.condition(emb, *text, flags(1, 0, 1), flags(1, 0, 1))).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []
    fresh = answer(Decoder(TINY), noised, emb, text)
    assert_close(fresh, torch.zeros(3, 3, SIZE, SIZE), rtol=0, atol=0)


def test_decoder_attends_at_16_and_8_pixels_by_default():
    default, sides = DecoderConfig(D, W, L), []
    levels = dict(multiples=default.multiples, attention_levels=default.attention_levels)
    model, size = Decoder(replace(TINY, **levels)), default.size
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda module, args: sides.append(args[0].shape[-1]))
    noised = torch.randn(1, 3, size, size), torch.tensor([3])
    answer(model, noised, unit(1, D), captions([3])[1:], flags(1), flags(1))
    assert sides == [16, 8, 8, 8, 8, 16, 16]  # down, in the middle, and two a level going up


@pytest.mark.parametrize("closed", [(), ("image_to_tokens",), ("image_to_time",),
                                    ("image_to_tokens", "image_to_time")])
def test_image_embedding_acts_by_the_timestep_and_by_four_tokens(closed):
    model, noised, emb, text = case()
    for name in closed:
        getattr(model, name).weight.data.zero_()
    one, other = (answer(model, noised, e, text) for e in (emb, unit(3, D)))
    if len(closed) == 2:
        assert_close(one, other, rtol=0, atol=0)
    else:
        assert differs(one, other)


@pytest.mark.parametrize("hidden", [None, 24])
def test_the_unet_is_told_time_embedding_end_of_text_and_four_tokens_before_the_captions(hidden):
    model, (x_t, t), emb, (text_enc, text_mask) = case(image_hidden=hidden, emb_width=40)
    told = []
    model.unet.register_forward_pre_hook(lambda module, args: told.append(args[1:]))
    keep_emb, keep_text = flags(1, 0, 1), flags(1, 1, 0)
    answer(model, (x_t, t), emb, (text_enc, text_mask), keep_emb, keep_text)
    emb_told, context, mask = told[0]
    with torch.no_grad():
        image = torch.stack([emb[0], model.null_image_emb, emb[2]]) * math.sqrt(D)
        if hidden:  # one layer before both pathways
            image = F.silu(image @ model.image_in[0].weight.T + model.image_in[0].bias)
        # Example 0 ends with its token 7, example 1 with its token 2, example 2 has no caption.
        ends = [model.text_to_time(context[0, 4 + 7]), model.text_to_time(context[1, 4 + 2]),
                model.null_caption]
        wanted = model.time(t) + model.image_to_time(image) + torch.stack(ends)
        assert_close(emb_told, wanted, rtol=0, atol=1e-5)
        for k in range(4):  # each token is its own projection of the whole embedding
            rows = slice(k * X, (k + 1) * X)
            weight, bias = model.image_to_tokens.weight[rows], model.image_to_tokens.bias[rows]
            assert_close(context[:, k], image @ weight.T + bias, rtol=0, atol=1e-5)
    real = text_mask & keep_text[:, None]  # a dropped caption is not looked at
    assert_close(mask, torch.cat([torch.ones(3, IMAGE_TOKENS, dtype=torch.bool), real], dim=1))


def test_padding_tokens_of_the_caption_are_ignored_and_every_real_one_counts():
    # In float64: one token among many pixels does little.
    model, (x_t, t), emb, (text_enc, text_mask) = case()
    model, noised = model.double(), (x_t.double(), t)
    emb, text_enc = emb.double(), text_enc.double()
    before = answer(model, noised, emb, (text_enc, text_mask))
    # Seen elsewhere: features behind the end of text are junk.
    junk = torch.where(text_mask[..., None], text_enc, 10 * torch.randn_like(text_enc))
    after = answer(model, noised, emb, (junk, text_mask))
    assert_close(after, before, rtol=0, atol=1e-10)
    for j in range(L):
        changed = text_enc.clone()
        changed[:, j] += torch.randn(3, W)
        moved = (answer(model, noised, emb, (changed, text_mask)) - before).flatten(1).abs()
        assert (moved.amax(1)[text_mask[:, j]] > 1e-7).all()


# --- dropping and guidance ------------------------------------------------------------------------


def test_dropped_conditions_do_not_act_and_kept_ones_do():
    model, noised, emb, text = case()
    keep_emb, keep_text = flags(1, 0, 1), flags(0, 1, 1)
    before, by_emb, by_text = (
        answer(model, noised, e, c, keep_emb, keep_text)
        for e, c in ((emb, text), (unit(3, D), text), (emb, captions([5, 2, L])[1:]))
    )
    assert_close(by_emb[~keep_emb], before[~keep_emb], rtol=0, atol=0)
    assert_close(by_text[~keep_text], before[~keep_text], rtol=0, atol=1e-6)
    assert differs(by_emb[keep_emb], before[keep_emb])
    assert differs(by_text[keep_text], before[keep_text])


@pytest.mark.parametrize("image_rate, caption_rate", [(0.1, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_embedding_and_caption_are_dropped_at_their_rates_independently(
        monkeypatch, image_rate, caption_rate):
    B, seen = 20000, []
    model = make_decoder(weight_cap=None, drop_image_emb=image_rate, drop_caption=caption_rate)
    monkeypatch.setattr(model, "condition", lambda *args: seen.append(args[3:]) or {})
    monkeypatch.setattr(model, "forward", lambda x_t, t: torch.zeros_like(x_t))
    image = pictures(B, 1)
    loss = model.loss(batch_of([1] * B, image=image))
    keep_emb, keep_caption = seen[0]
    for rate, chosen in ((image_rate, ~keep_emb), (caption_rate, ~keep_caption),
                         (image_rate * (1 - caption_rate), ~keep_emb & keep_caption)):  # fig. 8: 5%
        assert chosen.shape == (B,)  # a decision per example
        assert abs(chosen.float().mean() - rate) <= 3 * math.sqrt(rate * (1 - rate) / B)
    # An answer of zero where x_0 is asked for costs the mean square of the pictures.
    assert_close(loss, image.square().mean(), rtol=1e-5, atol=0)
    config = DecoderConfig(D, W, L)
    assert (config.drop_image_emb, config.drop_caption) == (0.1, 0.5)  # paper sec. 2.1


def test_null_embedding_and_null_caption_are_learned_from_dropped_examples_only():
    model, noised, emb, text = case()
    for keep in (YES, flags(1, 0, 1)):
        out = model(*noised, **model.condition(emb, *text, keep, keep))
        nulls = [model.null_image_emb, model.null_caption]
        for gradient in torch.autograd.grad(out.square().sum(), nulls):
            assert bool(gradient.any()) == (not keep.all())


def test_a_missing_condition_is_a_dropped_one():
    model, noised, emb, text = case()
    for given, keep in (((emb, None, None), (YES, NO)), ((None, *text), (NO, YES)),
                        ((emb, *text), (YES, YES))):
        wanted = answer(model, noised, emb, text, *keep)
        assert_close(model.network(*given)(*noised).detach(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_goes_from_neither_condition_at_0_to_both_at_1_and_beyond(scale):
    model, noised, emb, text = case()
    cond, uncond = (answer(model, noised, emb, text, keep, keep) for keep in (YES, NO))
    out = model.network(emb, *text, scale)(*noised).detach()
    assert_close(out[:, :3], (1 - scale) * uncond[:, :3] + scale * cond[:, :3], rtol=0, atol=1e-4)
    assert_close(out[:, 3:], cond[:, 3:], rtol=0, atol=1e-5)  # the variance is not guided


# --- what it is trained on ------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["image_emb", "text_emb", "caption"])
def test_each_decoder_is_trained_on_its_own_condition_alone(condition):
    model = make_decoder(condition=condition, drop_image_emb=0.0, drop_caption=0.0)
    batch = batch_of([3, 5], image=pictures(2, SIZE))

    def loss(**changes):
        torch.manual_seed(0)
        return model.loss(batch | changes)

    for name in ("image_emb", "text_emb"):
        assert (loss(**{name: unit(2, D)}) != loss()) == (name == condition)
    assert loss(text_enc=torch.randn(2, L, W)) != loss()
    loss().backward()  # GLIDE's way, captions alone, still learns the null embedding
    assert bool(model.null_image_emb.grad.any()) == (condition == "caption")


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta, steps", [(None, None), (0.0, None), (0.5, 2)])
def test_sample_is_the_diffusions_sampler_on_the_guided_network(eta, steps):
    model, _, emb, text = case()
    settings = {} if eta is None else {"eta": eta}
    draw = model.diffusion.sample if eta is None else model.diffusion.ddim_sample
    x_T, visited = torch.randn(3, 3, SIZE, SIZE), []
    wanted = draw(model.network(emb, *text, 2.0), x_T.shape, steps=steps or TINY.sample_steps,
                  noise=SeededNoise([1, 2, 3]), x_T=x_T, **settings)
    ours = model.sample(emb, *text, scale=2.0, steps=steps, eta=eta, noise=SeededNoise([1, 2, 3]),
                        x_T=x_T, on_step=lambda k, t, *x: visited.append(t))
    assert_close(ours, wanted, rtol=0, atol=1e-5)
    assert ours.abs().max() <= 1 + 1e-5  # each predicted x_0 is clipped, the last one is drawn
    assert len(visited) == (steps or TINY.sample_steps)


def test_glides_decoder_reads_the_words_themselves():
    """A table of V token embeddings is a linear layer on one-hot features of width V."""
    V, glide = 20, make_decoder(condition="caption", vocab_size=20)
    other = make_decoder(condition="caption", text_width=V)
    table = glide.state_dict()["text_in.weight"]
    other.load_state_dict({**glide.state_dict(), "text_in.weight": table.T,
                           "text_in.bias": torch.zeros(X)})
    batch = batch_of([L, 3, 1], image=pictures(3, SIZE)) | {"text_ids": torch.randint(V, (3, L))}
    one_hot = batch | {"text_enc": F.one_hot(batch["text_ids"], V).float()}
    t, losses, drawn = torch.tensor([3, 20, 40]), [], []
    for model in (glide, other):
        torch.manual_seed(0)
        losses.append(model.loss(one_hot, t))
        drawn.append(model.sample(None, *model.text_of(one_hot), noise=SeededNoise([1, 2, 3])))
    assert_close(*losses)
    assert_close(*drawn)
    assert_close(glide.text_of(batch)[0], batch["text_ids"], rtol=0, atol=0)


@pytest.mark.parametrize("condition", ["image_emb", "caption"])
def test_preview_draws_the_captions_from_what_the_decoder_is_trained_on(condition):
    model, batch = make_decoder(condition=condition), batch_of([3, 5], image=pictures(2, SIZE))
    figures, drawn, names = model.preview(FakeBatches(batch, ["a", "b"]))
    emb = batch["image_emb"] if condition == "image_emb" else None
    wanted = model.sample(emb, batch["text_enc"], batch["text_mask"], scale=2.0,
                          noise=SeededNoise([0, 1]))
    assert_close(drawn, wanted, rtol=0, atol=0)
    assert figures == {} and names == ["a", "b"]
