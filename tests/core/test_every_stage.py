"""Claims about all stages at once: noise levels as an argument, seeds, eval mode, bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ar_prior import AutoregressivePrior, AutoregressivePriorConfig
from decoder import Decoder, DecoderConfig
from diffusion import SeededNoise
from helpers import D, L, T, W, batch_of, captions, differs, pictures, randomise, unit
from prior import DiffusionPrior, PriorConfig
from upsampler import Upsampler, UpsamplerConfig

CLIP = dict(dim=D, text_width=W, text_len=L)
PRIOR = dict(**CLIP, width=32, depth=2, heads=2)
UNET = dict(size=16, channels=8, multiples=(1, 2), diffusion_steps=T, sample_steps=4)
DECODER = dict(**CLIP, **UNET, attention_levels=(1,), head_channels=8, context_width=32,
               text_depth=1)
DIFFUSION_STAGES = {
    "prior": lambda: DiffusionPrior(
        PriorConfig(**PRIOR, copies=3, diffusion_steps=T, sample_steps=4)),
    "decoder": lambda: Decoder(DecoderConfig(**DECODER, dropout=0.5)),
    "decoder of v": lambda: Decoder(
        DecoderConfig(**DECODER, predict="v", variance="learned", weight_cap=None, stem=2)),
    "upsampler": lambda: Upsampler(UpsamplerConfig(**UNET, low_size=4, crop=16, dropout=0.5)),
}
STAGES = DIFFUSION_STAGES | {
    "ar_prior": lambda: AutoregressivePrior(AutoregressivePriorConfig(**PRIOR, components=3)),
}
every_diffusion_stage = pytest.mark.parametrize("stage", DIFFUSION_STAGES)

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def make(stage):
    model = randomise(STAGES[stage]())
    if stage == "ar_prior":
        model.fit(unit(200, D), unit(200, D))
    return model


def training_batch(B=4):
    image = pictures(B, 16)
    return batch_of([L, 3, 5, 1][:B], image=image, low=F.avg_pool2d(image, 4))


def conditions(stage):
    """What sample() is given to draw three, and how it is guided."""
    if stage == "upsampler":
        return [pictures(3, 4)], {}
    text = list(captions([L, 3, 5]))
    return (text if "prior" in stage else [unit(3, D), *text[1:]]), {"scale": 2.0}


@every_diffusion_stage
def test_noise_levels_that_are_given_are_the_ones_used(stage):
    model, seen = make(stage), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[1]), with_kwargs=True)
    t = torch.tensor([0, 7, 30, T - 1])
    model.loss(training_batch(), t)
    model.loss(training_batch())
    copies = len(seen[0]) // 4
    assert copies == (3 if stage == "prior" else 1)
    assert_close(seen[0], t.repeat_interleave(copies))
    assert len(seen[1].unique()) > 1  # drawn, and one for each


@pytest.mark.parametrize("stage", STAGES)
def test_a_draw_depends_on_its_seed_and_not_on_its_batch(stage):
    model, (given, settings) = make(stage), conditions(stage)
    together = model.sample(*given, **settings, noise=SeededNoise([7, 8, 9]))
    for k in range(3):
        alone = model.sample(*(x[k:k + 1] for x in given), **settings, noise=SeededNoise([7 + k]))
        assert_close(together[k], alone[0], rtol=0, atol=1e-4)
    assert differs(model.sample(*given, **settings, noise=SeededNoise([17, 18, 19])), together)


@pytest.mark.parametrize("stage", ["decoder", "upsampler"])
def test_drawing_is_without_dropout_and_leaves_the_mode_as_it_was(stage):
    model, (given, settings) = make(stage), conditions(stage)
    expected = model.sample(*given, **settings, noise=SeededNoise([1, 2, 3]))
    drawn = model.train().sample(*given, **settings, noise=SeededNoise([1, 2, 3]))
    assert_close(drawn, expected, rtol=0, atol=0)
    assert all(m.training for m in model.modules())


@every_diffusion_stage
def test_bf16_autocast_gives_finite_losses_at_every_level_and_float32_draws(stage):
    model, batch, (given, settings) = make(stage), training_batch(), conditions(stage)
    losses, draws = [], []
    for enabled in (False, True):  # seen elsewhere: log-variances in half precision
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(batch, torch.tensor([0, 1, 25, T - 1])))
            draws.append(model.sample(*given, **settings, noise=SeededNoise([1, 2, 3])))
    losses[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert losses[1].dtype == draws[1].dtype == torch.float32
    assert draws[1].isfinite().all() and draws[1].abs().max() <= 1 + 1e-5
    assert_close(losses[1], losses[0], rtol=0.05, atol=0)
    assert (draws[1] - draws[0]).abs().mean() < 0.1
