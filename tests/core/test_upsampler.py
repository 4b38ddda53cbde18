"""Claims about the upsamplers: what they see, how training pairs are made, how they sample."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import cosine_betas, linear_betas
from helpers import FakeBatches, pictures
from networks import UNet
from support import degradations
from upsampler import Upsampler, UpsamplerConfig, area_average, training_pair

TINY = dict(low_size=16, size=64, crop=16, channels=8, multiples=(1, 2))
FIRST = UpsamplerConfig(**TINY, degradation="blur", schedule="cosine", sample_steps=27)
SECOND = UpsamplerConfig(**TINY, degradation="bsr", schedule="linear", sample_steps=15)
PLAIN = UpsamplerConfig(**TINY, degradation="none")

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


# --- no attention ---------------------------------------------------------------------------------


def attention_in(network, *inputs):
    """Names of the attention-like modules of a network, and of the operations that it runs."""
    names = {type(m).__name__ for m in network.modules()}

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(str(func))
            return func(*args, **(kwargs or {}))

    with Operations(), torch.no_grad():
        network(*inputs)
    return [n for n in names if any(w in n.lower() for w in ("attention", "softmax", "bmm"))]


@pytest.mark.parametrize("multiples", [(1, 2, 3, 4), (1, 1, 2, 2, 4, 4)])
def test_no_attention_at_any_level_neither_built_nor_run(multiples):
    model = Upsampler(UpsamplerConfig(channels=8, multiples=multiples))
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    assert attention_in(model, x, t, x) == []
    # The detector works: the decoder's U-Net, which attends, is caught, module and operation.
    unet = UNet(3, 3, 8, (1, 2), 1, 16, attention_levels=(1,), context_dim=8)
    inputs = (torch.zeros(1, 16), torch.zeros(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    assert len(attention_in(unet, torch.zeros(1, 3, 8, 8), *inputs)) >= 2


def test_table_3_gives_the_papers_parameter_counts():
    first = UpsamplerConfig(channels=320, blocks=3)
    sizes = dict(low_size=256, size=1024, crop=256)
    second = UpsamplerConfig(**sizes, channels=192, blocks=2, multiples=(1, 1, 2, 2, 4, 4))
    for config, millions in ((first, 700), (second, 300)):
        with torch.device("meta"):  # shapes without memory
            count = sum(p.numel() for p in Upsampler(config).parameters())
        assert_close(count / 1e6, float(millions), rtol=0.2, atol=0)


# --- training pairs -------------------------------------------------------------------------------


class OnePicture:
    """A data set of one random picture. Channels 0 and 1 tell the row and the column of a pixel."""

    def __init__(self, size):
        ramp = torch.arange(size) / size
        self.picture, self.windows = pictures(1, size)[0], []
        self.picture[0], self.picture[1] = ramp[:, None], ramp[None, :]

    def image(self, i, size, crop):
        top, left, side = crop
        assert 0 <= min(top, left) <= max(top, left) + side <= size == self.picture.shape[-1]
        self.windows.append(crop)
        return self.picture[:, top:top + side, left:left + side]

    def place(self, target):
        """The (top, left) of a target crop, read from its pixels."""
        return tuple(round(float(target[k, 0, 0]) * self.picture.shape[-1]) for k in (0, 1))


@pytest.mark.parametrize("factor", [2, 4])
def test_no_corruption_equals_the_plain_resize_and_each_low_pixel_is_the_mean_of_its_block(factor):
    config = UpsamplerConfig(**TINY | {"low_size": 64 // factor}, degradation="none")
    dataset, n = OnePicture(64), 16 // factor
    batch = Upsampler.batch(config, dataset, None, range(20), np.random.default_rng(0))
    blocks = batch["image"].numpy().reshape(20, 3, n, factor, n, factor).mean(axis=(3, 5))
    assert_close(batch["low"], torch.from_numpy(blocks))
    assert_close(area_average(batch["image"], factor), batch["low"])
    assert len({dataset.place(target) for target in batch["image"]}) > 10


def box_blur(low, rng):
    """Reaches 8 pixels far, as BSR may: exact only where all of them are there."""
    return F.avg_pool2d(F.pad(low[None], (8,) * 4, mode="replicate"), 17, stride=1)[0]


@pytest.mark.parametrize("kind, size, tries", [("blur", 32, 400), ("bsr", 128, 100)])
def test_corruption_comes_before_the_crop_so_its_edge_has_true_neighbours(
        monkeypatch, kind, size, tries):
    monkeypatch.setitem(degradations.DEGRADATIONS, "bsr", box_blur)
    config = UpsamplerConfig(low_size=size // 4, size=size, crop=size // 4, degradation=kind,
                             multiples=(1, 2))
    dataset, rng, places, side = OnePicture(size), np.random.default_rng(0), set(), size // 4
    whole = degradations.DEGRADATIONS[kind](F.avg_pool2d(dataset.picture, 4), rng)
    for _ in range(tries):
        target, low = training_pair(dataset, 0, config, rng)
        y, x = dataset.place(target)
        assert_close(target, dataset.picture[:, y:y + side, x:x + side], rtol=0, atol=0)
        window = whole[:, y // 4:(y + side) // 4, x // 4:(x + side) // 4]
        assert_close(low, window, rtol=0, atol=1e-5)
        places.add((y, x))
    aligned = {(4 * y, 4 * x) for y in range(7) for x in range(7)}
    assert places == aligned or kind == "bsr"  # every place aligned to the factor, and no other


@pytest.mark.parametrize("config, margin", [(PLAIN, 0), (FIRST, 1), (SECOND, 8)])
def test_a_pair_is_drawn_from_crop_and_margin_alone_shrunk_a_little_corrupted_and_seeded(
        config, margin):
    dataset = OnePicture(64)
    draw = lambda seed: training_pair(dataset, 0, config, np.random.default_rng(seed))  # noqa: E731
    for seed in range(20):
        (target, low), again, other = draw(seed), draw(seed), draw(seed + 100)
        assert_close(again, (target, low), rtol=0, atol=0)
        assert (other[1] - low).abs().max() > 1e-3
        # The ramps of channels 0 and 1 survive: one low-resolution pixel of shift would be 0.06.
        shrunk = F.avg_pool2d(target, 4)
        assert_close(low[:2].mean((1, 2)), shrunk[:2].mean((1, 2)), rtol=0, atol=0.04)
        assert config is PLAIN or (low - shrunk).abs().max() > 1e-3
        assert low.abs().max() <= 1 + 1e-6
    assert {side for _, _, side in dataset.windows} == {min(16 + 2 * margin * 4, 64)}


# --- the model ------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """In place of a U-Net: knows the picture and answers what is asked. Is told t itself."""

    def __init__(self, model, picture, offset=0.0):
        super().__init__()
        self.table, self.predict = model.diffusion.alphas_cumprod, model.config.predict
        self.picture, self.offset, self.seen, self.t = picture, offset, [], []
        model.unet, model.time = self, nn.Identity()

    def forward(self, x, t):
        self.seen.append(x), self.t.append(t.tolist())
        alpha_bar = self.table[t].float().view(-1, 1, 1, 1)
        noise = (x[:, :3] - alpha_bar.sqrt() * self.picture) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.picture
        lacks = self.picture - x[:, 3:]  # of the enlarged low picture
        return {"x_0": lacks, "noise": noise, "v": v}[self.predict] + self.offset


@pytest.mark.parametrize("predict", ["v", "noise", "x_0"])
def test_the_loss_is_the_mean_squared_error_of_the_prediction(predict):
    model, picture = Upsampler(UpsamplerConfig(**TINY, predict=predict)), pictures(4, 16)
    batch = {"image": picture, "low": F.avg_pool2d(picture, 4)}
    for offset in (0.0, 0.5):
        Oracle(model, picture, offset)
        loss = model.loss(batch, torch.tensor([100, 300, 700, 999]))
        assert_close(loss, torch.tensor(offset**2), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config, steps, betas", [(FIRST, 27, cosine_betas(1000)),
                                                  (SECOND, 15, linear_betas(1000))])
def test_sampling_with_a_perfect_network_returns_the_target(config, steps, betas):
    model, picture = Upsampler(config), pictures(2, 64)[:, :, :32]  # not the training size, oblong
    assert_close(model.diffusion.alphas_cumprod, (1 - betas).cumprod(0))
    oracle, low = Oracle(model, picture), F.avg_pool2d(picture, 4)
    assert_close(model.sample(low), picture, rtol=0, atol=1e-4)
    # One call a step, on the batch as it is: no guidance. From the noisiest level to the cleanest.
    assert len(oracle.t) == steps
    assert oracle.t[0] == [999, 999] and oracle.t[-1] == [0, 0]
    # In training and in sampling it sees the noised picture and the enlarged low one.
    model.loss({"image": picture, "low": low})
    enlarged = F.interpolate(low, (32, 64), mode="bicubic", align_corners=False)
    for x in oracle.seen:
        assert x.shape[1] == 6
        assert_close(x[:, 3:], enlarged)
    Oracle(model, 2 * picture)  # drawn pictures stay in range where the network overshoots
    assert_close(model.sample(low), (2 * picture).clamp(-1, 1), rtol=0, atol=1e-3)


def test_preview_shows_input_drawn_and_target_and_measures_the_psnr():
    model, picture = Upsampler(PLAIN), pictures(2, 16)
    batch = {"image": picture.clone(), "low": F.avg_pool2d(picture, 4)}
    Oracle(model, picture)
    batch["image"] += 0.2  # so the drawn one, which is perfect, is off by a tenth of the range
    figures, rows, names = model.preview(FakeBatches(batch))
    assert figures["psnr"] == pytest.approx(20.0, abs=1e-2)
    nearest = batch["low"].repeat_interleave(4, 2).repeat_interleave(4, 3)
    wanted = torch.stack([nearest, picture, batch["image"]], dim=1).flatten(0, 1)
    assert_close(rows, wanted, rtol=0, atol=1e-4)
    assert names == ["input", "drawn", "target"] * 2
