"""How low-resolution training pictures are corrupted: blur, and BSR (paper sec. 2.1)."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

def gaussian_blur(low, kernel, sigma):
    """Blur (3, h, w) by a gaussian of std `sigma` pixels, cut off to `kernel` x `kernel` (odd).

    A 2-D gaussian is the product of two 1-D ones, so rows and columns are blurred one after the
    other. The picture's edge pixels are repeated outwards, as if it went on in the same colour.
    """
    radius = kernel // 2
    offsets = torch.arange(-radius, radius + 1, dtype=low.dtype, device=low.device)
    weights = torch.exp(-offsets**2 / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, kernel)  # sum 1: same brightness
    low = F.pad(low[None], (radius,) * 4, mode="replicate")  # (1, 3, h + 2r, w + 2r)
    low = F.conv2d(low, weights, groups=3)  # along the rows
    return F.conv2d(low, weights.transpose(2, 3), groups=3)[0]  # down the columns: (3, h, w)


def degrade_none(low, rng):
    """No corruption, to see what the corruption is good for."""
    return low


def degrade_blur(low, rng=None):
    """The first upsampler's corruption: kernel 3, sigma 0.6 (paper sec. 2.1). Nothing is random."""
    return gaussian_blur(low, kernel=3, sigma=0.6)


def degrade_some_blur(low, rng):
    """The same blur, of any strength up to half as much again.

    Paper: sigma 0.6, always. We: from 0.1, which is none, to 0.9. Because: from one blur alone the
    upsampler learns to undo just that, and overdoes it where there is none: white rims.
    """
    return gaussian_blur(low, kernel=3, sigma=rng.uniform(0.1, 0.9))


# The second upsampler's is more varied: the BSR (blind super-resolution) degradation (paper sec.
# 2.1) of BSRGAN (2103.14006), here blur, resize, noise and JPEG in random order. Paper: parameters
# not stated. We: the ranges below. Because: they start at almost nothing (in sampling nothing is
# corrupted) and end at a fault that one sees. Each step keeps (3, h, w) and [-1, 1], so any order
# works.


def bsr_blur(low, rng):
    """Blur with a random sigma; 0.2 pixels is no blur at all."""
    return gaussian_blur(low, kernel=7, sigma=rng.uniform(0.2, 1.2))


def bsr_resize(low, rng):
    """Shrink to 50 .. 100% of the side and back again: what was finer is lost."""
    h, w = low.shape[-2:]
    scale = rng.uniform(0.5, 1.0)
    small = (max(1, round(h * scale)), max(1, round(w * scale)))
    # antialias=True averages before it picks pixels, for the reason given in area_average.
    low = F.interpolate(low[None], small, mode="bicubic", antialias=True)
    low = F.interpolate(low, (h, w), mode="bicubic")[0]
    return low.clamp(-1, 1)  # bicubic overshoots beside sharp edges


def bsr_noise(low, rng):
    """Add gaussian noise with a std of up to 0.06: 8 of the 255 grey levels."""
    noise = rng.standard_normal(tuple(low.shape), dtype=np.float32)
    return (low + rng.uniform(0.0, 0.06) * torch.from_numpy(noise)).clamp(-1, 1)


def bsr_jpeg(low, rng):
    """Save as a JPEG of random quality and load it again: 8x8 blocks and ringing edges."""
    levels = ((low + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)  # (h, w, 3), 0 .. 255
    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "JPEG", quality=int(rng.integers(50, 96)))
    levels = torch.from_numpy(np.array(Image.open(file)))
    return levels.permute(2, 0, 1).float() / 127.5 - 1  # (3, h, w), -1 .. 1


BSR_STEPS = (bsr_blur, bsr_resize, bsr_noise, bsr_jpeg)


def degrade_bsr(low, rng):
    """All four BSR steps, each with a random strength, in one of their 24 orders at random."""
    for k in rng.permutation(len(BSR_STEPS)):
        low = BSR_STEPS[k](low, rng)
    return low


DEGRADATIONS = {"none": degrade_none, "blur": degrade_blur, "some_blur": degrade_some_blur,
                "bsr": degrade_bsr}

# About how far a degradation looks around a pixel, in low-resolution pixels: the blur's kernel of 3
# sees one neighbour; BSR's JPEG works on blocks of 8, of 16 for colours (its blur sees 3, its
# resize a few).
MARGINS = {"none": 0, "blur": 1, "some_blur": 1, "bsr": 8}
