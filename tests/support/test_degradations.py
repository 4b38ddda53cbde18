"""Claims about the corruptions of the upsamplers' low-resolution training pictures."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from support import degradations
from support.degradations import BSR_STEPS

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def random_picture(size, seed=0):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blur_2d(picture, kernel, sigma):
    """Independent of the file: the sum over all offsets, weighted by the 2-D gaussian."""
    r, (h, w) = kernel // 2, picture.shape[-2:]
    padded = np.pad(picture.double().numpy(), ((0, 0), (r, r), (r, r)), mode="edge")
    total = weights = 0
    for dy, dx in itertools.product(range(2 * r + 1), repeat=2):
        weight = np.exp(-((dy - r) ** 2 + (dx - r) ** 2) / (2 * sigma**2))
        total, weights = total + weight * padded[:, dy : dy + h, dx : dx + w], weights + weight
    return torch.from_numpy(total / weights).float()


def test_blur_is_a_2d_gaussian_convolution_and_the_papers_has_kernel_3_and_sigma_06():
    low = random_picture(11)[:, :, :7]
    for kernel, sigma in ((7, 1.2), (5, 3.0)):
        blurred = degradations.gaussian_blur(low, kernel, sigma)
        assert_close(blurred, blur_2d(low, kernel, sigma), rtol=0, atol=1e-6)
    assert_close(degradations.degrade_blur(low), blur_2d(low, 3, 0.6), rtol=0, atol=1e-6)


def test_some_blur_goes_from_none_to_a_sigma_of_09():
    dot, rng = torch.zeros(3, 11, 11), np.random.default_rng(0)
    dot[:, 5, 5] = 1  # one bright pixel: what stays in its place says how wide the blur is
    out = torch.stack([degradations.degrade_some_blur(dot, rng) for _ in range(200)])
    assert_close(out[:, :, 4:7, 4:7].sum((1, 2, 3)), torch.full((200,), 3.0))  # a kernel of 3
    left = out[:, 0, 5, 5]
    widest, none = (blur_2d(dot, 3, sigma)[0, 5, 5] for sigma in (0.9, 0.1))
    assert widest <= left.min() < widest + 0.02 and none - 0.02 < left.max() <= none + 1e-6


@pytest.mark.parametrize("step, atol", list(zip(BSR_STEPS, (0.02, 0.005, 0.03, 0.02))))
def test_a_bsr_step_changes_detail_stays_in_range_and_moves_nothing(step, atol):
    # One wave, off the centre: a shift by half a pixel would show as 0.05.
    wave, rng = torch.sin(torch.arange(32) / 32 * 2 * torch.pi + 0.5), np.random.default_rng(0)
    smooth = (0.5 * wave[:, None] * wave[None, :]).expand(3, 32, 32).contiguous()
    mean = torch.stack([step(smooth, rng) for _ in range(50)]).mean(0)
    assert_close(mean[:, 4:-4, 4:-4], smooth[:, 4:-4, 4:-4], rtol=0, atol=atol)
    rough = random_picture(64).sign()  # only -1 and 1: overshoots would leave the range
    out = torch.stack([step(rough, rng) for _ in range(20)])
    assert out.abs().max() <= 1 + 1e-6 and (out - rough).abs().max() > 0.1


def test_bsr_strengths_vary_from_nearly_nothing_to_their_maximum():
    stripes, rng = torch.ones(3, 32, 32), np.random.default_rng(0)
    stripes[:, :, ::2] = -1  # the finest detail there is
    blur, resize = degradations.bsr_blur, degradations.bsr_resize
    for step, most, least in ((blur, 0.95, 0.05), (resize, 0.8, 0.1)):
        contrast = [step(stripes, rng)[:, 8:-8, 8:-8].std() for _ in range(200)]
        assert max(contrast) > most and min(contrast) < least
        assert np.median(contrast) < 0.3  # stripes become grey, not coarser stripes
    grey = torch.zeros(3, 32, 32)
    noise = torch.stack([degradations.bsr_noise(grey, rng).std() for _ in range(500)])
    assert_close(noise.mean(), torch.tensor(0.03), rtol=0, atol=0.002)  # uniform(0, 0.06)
    assert noise.max() < 0.065


def test_jpeg_takes_any_size_loses_more_at_lower_quality_and_keeps_flat_greys():
    def jpeg(low, quality):
        return degradations.bsr_jpeg(low, SimpleNamespace(integers=lambda low, high: quality))

    for h, w in ((1, 1), (7, 13), (64, 33)):
        low = random_picture(64)[:, :h, :w]
        assert F.mse_loss(jpeg(low, 95), low) <= F.mse_loss(jpeg(low, 50), low)
    for level in range(256):  # at quality 95 a block's mean is kept to an eighth of a grey level
        grey = torch.full((3, 8, 8), level / 127.5 - 1)
        assert_close(jpeg(grey, 95), grey, rtol=0, atol=1e-6)


def test_bsr_applies_all_four_steps_in_every_order(monkeypatch):
    order = []
    recorders = [lambda low, rng, k=k: (order.append(k), low)[1] for k in range(4)]
    monkeypatch.setattr(degradations, "BSR_STEPS", recorders)
    rng, orders = np.random.default_rng(0), set()
    for _ in range(500):
        order.clear()
        degradations.degrade_bsr(random_picture(4), rng)
        orders.add(tuple(order))
    assert len(orders) == 24 and {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}
