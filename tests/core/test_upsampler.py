"""Claims about the upsamplers: what they see, how training pairs are made, how they sample."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from support import degradations
from networks import UNet
from support.shapes import Shapes
from support.tools import UserError
from upsampler import area_average, Upsampler, UpsamplerConfig, training_pair

TINY = dict(low_size=16, size=64, crop=16, channels=8, multiples=(1, 2))
FIRST = UpsamplerConfig(**TINY, degradation="blur", schedule="cosine", sample_steps=27)
SECOND = UpsamplerConfig(**TINY, degradation="bsr", schedule="linear", sample_steps=15)
PLAIN = UpsamplerConfig(**TINY, degradation="none")


pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def random_picture(size, seed=0, batch=()):
    return torch.rand(*batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class OnePicture:
    """A data set of one random picture. Channels 0 and 1 tell the row and the column of a pixel."""

    def __init__(self, size):
        ramp = torch.arange(size) / size
        self.picture = random_picture(size)
        self.picture[0], self.picture[1] = ramp[:, None], ramp[None, :]
        self.windows = []

    def image(self, i, size, crop):
        top, left, side = crop
        assert size == self.picture.shape[-1] and 0 <= min(top, left)
        assert max(top, left) + side <= size
        self.windows.append(crop)
        return self.picture[:, top : top + side, left : left + side]

    def place(self, target):
        """The (top, left) of a target crop, read from its pixels."""
        return tuple(round(float(target[k, 0, 0]) * self.picture.shape[-1]) for k in (0, 1))


def randomise(model):
    """Fresh U-Nets answer zero; give every weight a value, so that the answer depends on them."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5 / max(1, p[0].numel()) ** 0.5)
    return model


class Oracle(nn.Module):
    """In place of a U-Net: knows the picture and answers what is asked. Is told t itself."""

    def __init__(self, model, picture, offset=0.0):
        super().__init__()
        self.table, self.picture, self.offset = model.diffusion.alphas_cumprod, picture, offset
        self.seen, self.t, self.predict = [], [], model.config.predict
        model.unet, model.time = self, nn.Identity()

    def forward(self, x, t):
        self.seen.append(x)
        self.t.append(t.tolist())
        if self.predict == "x_0":  # what the enlarged low picture lacks
            return self.picture - x[:, 3:] + self.offset
        alpha_bar = self.table[t].float().view(-1, 1, 1, 1)
        noise = (x[:, :3] - alpha_bar.sqrt() * self.picture) / (1 - alpha_bar).sqrt()
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * self.picture + self.offset


# --- no attention ----------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Writes down the name of every operation that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def attention_in(network, *inputs):
    """Names of the attention-like modules of a network, and of the operations that it runs."""
    modules = [type(m).__name__ for m in network.modules()]
    with Operations() as operations, torch.no_grad():
        network(*inputs)
    words = ("attention", "softmax", "bmm")
    return [n for n in [*modules, *operations.names] if any(w in n.lower() for w in words)]


@pytest.mark.parametrize("multiples", [(1, 2, 3, 4), (1, 1, 2, 2, 4, 4)])
def test_no_attention_at_any_level_neither_built_nor_run(multiples):
    model = Upsampler(UpsamplerConfig(channels=8, multiples=multiples))
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
    assert attention_in(model, x, t, x) == []
    # The detector works: the decoder's U-Net, which attends, is caught, module and operation.
    unet = UNet(3, 3, 8, (1, 2), 1, 16, attention_levels=(1,), context_dim=8)
    inputs = (torch.zeros(1, 16), torch.zeros(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    assert len(attention_in(unet, torch.zeros(1, 3, 8, 8), *inputs)) >= 2


def test_a_crop_gives_what_the_whole_picture_gives_there():
    # Far from the crop's border, and without group norm, the one layer that sees the whole picture.
    model = randomise(Upsampler(FIRST)).eval()
    for layer in model.unet.modules():
        for name, child in layer.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(layer, name, nn.Identity())
    x_t, cond = torch.randn(1, 3, 96, 160), torch.randn(1, 3, 96, 160)
    t = torch.tensor([500])
    with torch.no_grad():
        whole = model(x_t, t, cond)[..., 44:52]
        crop = model(x_t[..., :96], t, cond[..., :96])[..., 44:52]
    assert whole.std() > 1e-3
    assert_close(crop, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_table_3_gives_the_papers_parameter_counts():
    first = UpsamplerConfig(channels=320, blocks=3)
    sizes = dict(low_size=256, size=1024, crop=256)
    second = UpsamplerConfig(**sizes, channels=192, blocks=2, multiples=(1, 1, 2, 2, 4, 4))
    for config, millions in ((first, 700), (second, 300)):
        with torch.device("meta"):  # shapes without memory
            count = sum(p.numel() for p in Upsampler(config).parameters())
        assert_close(count / 1e6, float(millions), rtol=0.2, atol=0)


# --- resize ----------------------------------------------------------------------------------


def test_area_average_is_the_mean_of_each_block():
    picture = random_picture(24)
    blocks = picture.numpy().reshape(3, 6, 4, 6, 4).mean(axis=(2, 4))
    assert_close(area_average(picture, 4), torch.from_numpy(blocks))


# --- training pairs --------------------------------------------------------------------------


def window_of(picture, top, left, side):
    return picture[:, top : top + side, left : left + side]


@pytest.mark.parametrize("factor", [2, 4])
def test_no_corruption_equals_the_plain_resize(factor):
    config = UpsamplerConfig(**TINY | {"low_size": 64 // factor}, degradation="none")
    dataset, rng = OnePicture(64), np.random.default_rng(0)
    for _ in range(20):
        target, low = training_pair(dataset, 0, config, rng)
        n = 16 // factor
        blocks = target.numpy().reshape(3, n, factor, n, factor).mean(axis=(2, 4))
        assert_close(low, torch.from_numpy(blocks))


def test_blur_comes_before_the_crop():
    # So the low crop is a window of the blurred whole picture, right up to the crop's edge.
    dataset, rng, places = OnePicture(64), np.random.default_rng(0), set()
    whole = degradations.degrade_blur(F.avg_pool2d(dataset.picture, 4))
    for _ in range(2000):
        target, low = training_pair(dataset, 0, FIRST, rng)
        top, left = dataset.place(target)
        assert_close(target, window_of(dataset.picture, top, left, 16), rtol=0, atol=0)
        assert_close(low, window_of(whole, top // 4, left // 4, 4), rtol=0, atol=1e-6)
        places.add((top, left))
    # Every place that is aligned to the factor occurs, and no other; the corners as well.
    assert places == {(4 * y, 4 * x) for y in range(13) for x in range(13)}


def test_bsr_sees_true_neighbours_8_pixels_around_the_crop(monkeypatch):
    # A box blur that reaches 8 pixels far stands in for BSR: exact only if all of them are there.
    def box_blur(low, rng):
        return F.avg_pool2d(F.pad(low[None], (8,) * 4, mode="replicate"), 17, stride=1)[0]

    monkeypatch.setitem(degradations.DEGRADATIONS, "bsr", box_blur)
    config = UpsamplerConfig(low_size=32, size=128, crop=32, multiples=(1, 2), degradation="bsr")
    dataset, rng = OnePicture(128), np.random.default_rng(0)
    whole = box_blur(F.avg_pool2d(dataset.picture, 4), rng)
    for _ in range(200):
        target, low = training_pair(dataset, 0, config, rng)
        top, left = dataset.place(target)
        assert_close(low, window_of(whole, top // 4, left // 4, 8), rtol=0, atol=1e-5)


def test_only_the_crop_and_its_margin_are_drawn():
    for config, margin in ((PLAIN, 0), (FIRST, 1), (SECOND, 8)):
        dataset, rng = OnePicture(64), np.random.default_rng(0)
        for _ in range(20):
            training_pair(dataset, 0, config, rng)
        expected = min(16 + 2 * margin * 4, 64)
        assert {side for _, _, side in dataset.windows} == {expected}


@pytest.mark.parametrize("config", [FIRST, SECOND])
def test_a_pairs_low_is_its_target_shrunk_and_a_little_corrupted(config):
    dataset = OnePicture(64)
    for seed in range(20):
        target, low = training_pair(dataset, 0, config, np.random.default_rng(seed))
        shrunk = F.avg_pool2d(target, 4)
        # The ramps of channels 0 and 1 survive: one low-resolution pixel of shift would be 0.06.
        assert_close(low[:2].mean((1, 2)), shrunk[:2].mean((1, 2)), rtol=0, atol=0.04)
        assert (low - shrunk).abs().max() > 1e-3
        assert low.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("config", [FIRST, SECOND])
def test_the_same_seed_gives_the_same_pair_and_another_seed_another(config):
    dataset = OnePicture(64)
    pair = lambda seed: training_pair(dataset, 0, config, np.random.default_rng(seed))
    one, same, other = pair(1), pair(1), pair(2)
    assert_close(one, same, rtol=0, atol=0)
    assert (one[1] - other[1]).abs().max() > 1e-3


def test_a_pair_of_the_shapes_data_set_is_a_window_of_its_picture():
    dataset, rng = Shapes(3, "train", seed=0), np.random.default_rng(0)
    for i in range(3):
        whole = dataset.image(i, 64)
        target, low = training_pair(dataset, i, PLAIN, rng)
        windows = whole.unfold(1, 16, 4).unfold(2, 16, 4).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (windows - target).abs().amax((1, 2, 3)).min() < 1e-6
        assert_close(low, F.avg_pool2d(target, 4))


# --- the model -------------------------------------------------------------------------------


def test_the_first_schedule_is_cosine_and_the_second_linear():
    u = np.arange(1001) / 1000
    cosine = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = np.cumprod(1 - np.minimum(1 - cosine[1:] / cosine[:-1], 0.999))
    linear = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for config, expected in ((FIRST, cosine), (SECOND, linear)):
        assert_close(Upsampler(config).diffusion.alphas_cumprod, torch.from_numpy(expected))


def test_the_network_sees_the_noised_picture_and_the_enlarged_low_one_in_training_and_sampling():
    model = Upsampler(FIRST)
    picture = random_picture(16, batch=(2,))
    low = F.avg_pool2d(picture, 4)
    oracle = Oracle(model, picture)
    model.loss({"image": picture, "low": low})
    model.sample(low, steps=3)
    enlarged = F.interpolate(low, (16, 16), mode="bicubic", align_corners=False)
    assert len(oracle.seen) == 4
    for x in oracle.seen:
        assert x.shape[1] == 6
        assert_close(x[:, 3:], enlarged)


def test_the_enlarged_low_picture_lies_on_the_target():
    # Half a pixel of shift, as with aligned corners, would be an error of up to 0.1 here.
    wave = torch.sin(torch.arange(256) / 256 * 2 * torch.pi + 0.5)
    picture = (wave[:, None] * wave[None, :]).expand(1, 3, 256, 256)
    cond = Upsampler(FIRST).condition(F.avg_pool2d(picture, 4))
    assert_close(cond[..., 8:-8, 8:-8], picture[..., 8:-8, 8:-8], rtol=0, atol=0.01)


@pytest.mark.parametrize("predict", ["v", "noise", "x_0"])
def test_the_loss_is_the_mean_squared_error_of_the_prediction(predict):
    picture = random_picture(16, batch=(4,))
    batch = {"image": picture, "low": F.avg_pool2d(picture, 4)}
    model = Upsampler(UpsamplerConfig(**TINY, predict=predict))
    if predict in ("v", "x_0"):
        Oracle(model, picture)
        assert_close(model.loss(batch), torch.tensor(0.0), rtol=0, atol=1e-6)
        Oracle(model, picture, offset=0.5)
        assert_close(model.loss(batch), torch.tensor(0.25), rtol=1e-3, atol=0)
    else:  # a fresh U-Net answers 0, so the loss is the mean square of standard normal noise
        assert_close(model.loss(batch), torch.tensor(1.0), rtol=0, atol=0.1)


@pytest.mark.parametrize("config, steps", [(FIRST, 27), (SECOND, 15)])
def test_sampling_with_a_perfect_network_returns_the_target(config, steps):
    model = Upsampler(config)
    picture = random_picture(64, batch=(2,))[:, :, :32]  # not the training size, and oblong
    oracle = Oracle(model, picture)
    assert_close(model.sample(F.avg_pool2d(picture, 4)), picture, rtol=0, atol=1e-4)
    # One call a step, on the batch as it is: no guidance. From the noisiest level to the cleanest.
    assert len(oracle.t) == steps
    assert oracle.t[0] == [999, 999] and oracle.t[-1] == [0, 0]


def test_an_untrained_network_answers_with_the_plain_enlargement():
    model, low = Upsampler(FIRST), random_picture(4, batch=(2,))
    enlarged = F.interpolate(low, (16, 16), mode="bicubic", align_corners=False)
    assert_close(model.sample(low), enlarged.clamp(-1, 1), rtol=0, atol=1e-4)


def test_drawn_pictures_stay_in_range_where_the_network_overshoots():
    model = Upsampler(FIRST)
    picture = random_picture(16, batch=(1,))
    Oracle(model, 2 * picture)
    out = model.sample(F.avg_pool2d(picture, 4))
    assert_close(out, (2 * picture).clamp(-1, 1), rtol=0, atol=1e-3)


def test_a_stem_makes_the_unet_work_on_patches():
    model = Upsampler(UpsamplerConfig(**TINY, stem=4))
    seen = []
    model.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x_t, cond = torch.randn(2, 1, 3, 16, 16)
    model(x_t, torch.tensor([5]), cond)
    # A patch of 4 x 4 pixels of 6 channels is one place with 96 channels.
    patches = torch.cat([x_t, cond], 1).reshape(6, 4, 4, 4, 4).permute(0, 2, 4, 1, 3)
    assert_close(seen[0], patches.reshape(1, 96, 4, 4))


def waves(B, size):
    """Pictures (B, 3, size, size) of one random wave in each channel."""
    phase = torch.rand(B, 3, 1, 1) * 2 * torch.pi
    direction = torch.rand(2, B, 3, 1, 1) * 0.5
    place = torch.arange(float(size))
    return torch.sin(direction[0] * place[:, None] + direction[1] * place + phase)


def test_a_network_trained_on_crops_is_no_worse_on_the_whole_picture():
    model = Upsampler(PLAIN)
    pair = lambda picture: {"image": picture, "low": F.avg_pool2d(picture, 4)}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model.loss(pair(waves(16, 16)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        crops = torch.stack([model.loss(pair(waves(256, 16))) for _ in range(4)]).mean()
        whole = torch.stack([model.loss(pair(waves(32, 64))) for _ in range(10)]).mean()
    assert crops < 0.5  # it has learnt something: a fresh network's loss is about 0.75
    assert whole < 1.1 * crops


@pytest.mark.parametrize("training", [True, False])
def test_sampling_runs_in_eval_mode_and_restores_the_mode(training):
    model = randomise(Upsampler(UpsamplerConfig(**TINY, dropout=0.5)))
    low = random_picture(4, batch=(1,))
    expected = model.eval().sample(low, 3, [torch.Generator().manual_seed(0)])
    model.train()  # in training, dropout makes two looks at the same picture differ
    batch = torch.zeros(2, 1, 3, 16, 16)
    looks = [model(batch[0], torch.tensor([5]), batch[1]) for _ in range(2)]
    assert (looks[0] - looks[1]).abs().max() > 1e-3
    model.train(training)
    out = model.sample(low, 3, [torch.Generator().manual_seed(0)])
    assert_close(out, expected, rtol=0, atol=0)
    assert all(m.training == training for m in model.modules())

    def interrupt(k, t, x_t, pred_x_0):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.sample(low, 3, on_step=interrupt)
    assert all(m.training == training for m in model.modules())


def test_a_pictures_seed_gives_the_same_picture_in_any_batch():
    model = randomise(Upsampler(FIRST))
    low = random_picture(4, batch=(3,))
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]
    together = model.sample(low, 4, seeds(5, 6, 7))
    assert (together[0] - together[1]).abs().max() > 0.1
    assert_close(model.sample(low[1:2], 4, seeds(6)), together[1:2], rtol=0, atol=1e-4)


def test_under_bf16_autocast_the_picture_stays_float32_and_nearly_the_same():
    model = randomise(Upsampler(FIRST))
    low = random_picture(4, batch=(1,))
    draw = lambda: model.sample(low, 4, [torch.Generator().manual_seed(0)])
    expected = draw()
    with torch.autocast("cpu", torch.bfloat16):
        out = draw()
    assert out.dtype == torch.float32
    assert_close(out, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("wrong, words", [
    (dict(size=60), "size 60 is not a multiple of low_size 16"),
    (dict(size=16), "size 16 is not a multiple of low_size 16"),
    (dict(crop=18), "crop 18 does not fit: choose a multiple of 4 up to size 64"),
    (dict(crop=128), "crop 128 does not fit"),
    (dict(crop=36, stem=4), "crop 36 does not fit: choose a multiple of 8"),
    (dict(degradation="blurr"), "unknown degradation 'blurr'"),
])
def test_sizes_that_do_not_fit_are_user_errors(wrong, words):
    with pytest.raises(UserError, match=words):
        UpsamplerConfig(**TINY | wrong)


def test_pictures_that_do_not_fit_the_network_are_user_errors():
    model = Upsampler(UpsamplerConfig(**TINY, stem=4))
    with pytest.raises(UserError, match="3x4 becomes 12x16: both must be multiples of 8"):
        model.sample(torch.zeros(1, 3, 3, 4))
    with pytest.raises(UserError, match="4x3 becomes 16x12"):
        model.sample(torch.zeros(1, 3, 4, 3))
    with pytest.raises(UserError, match="4 times as large"):
        model.loss({"image": torch.zeros(1, 3, 32, 32), "low": torch.zeros(1, 3, 4, 4)})
    with pytest.raises(UserError, match="steps"):
        model.sample(torch.zeros(1, 3, 4, 4), steps=0)
