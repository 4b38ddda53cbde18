"""How the upsamplers' low training pictures are corrupted: blur, BSR (paper sec. 2.1, app. C).

In training an upsampler's input is a real picture, shrunk perfectly; in sampling it is a drawing
with faults of its own, and an upsampler that trusts every pixel would enlarge them. So in training,
and only there, the input is damaged a little.

Every degradation takes a float32 picture `low` (3, h, w) in [-1, 1] and a numpy Generator `rng`,
its only source of randomness, and returns a picture of the same form.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def gaussian_blur(low, kernel, sigma):
    """Blur by a gaussian of std `sigma` pixels, cut off to `kernel` x `kernel` pixels (odd). It is
    the product of two 1-D ones, so rows and columns are blurred one after the other."""
    radius = kernel // 2
    offsets = torch.arange(-radius, radius + 1.0)
    weights = torch.exp(-offsets**2 / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, kernel)  # sum 1: same brightness
    low = F.pad(low[None], (radius,) * 4, mode="replicate")  # (1, 3, h + 2r, w + 2r)
    low = F.conv2d(low, weights, groups=3)  # along the rows
    return F.conv2d(low, weights.mT, groups=3)[0]  # down the columns: (3, h, w)


def degrade_blur(low, rng=None):
    """The first upsampler's blur: kernel 3, sigma 0.6 (paper app. C). Nothing is random."""
    return gaussian_blur(low, kernel=3, sigma=0.6)


def degrade_some_blur(low, rng):
    """The same blur with a random sigma: 0.1, which does nothing, to 0.9. An upsampler trained on
    one blur learns to undo exactly that one, and draws white rims around what is sharp already."""
    return gaussian_blur(low, kernel=3, sigma=rng.uniform(0.1, 0.9))


# BSR, the degradation of blind super-resolution (BSRGAN, 2103.14006), is faults in random order.
# App. C points to the variant published with latent diffusion: two blurs (isotropic, anisotropic),
# the down-sampling itself as one of the shuffled steps, noise of 2 .. 25 of 255 grey levels, JPEG
# of quality 30 .. 95 with probability 0.9 and once more at the end. Here the picture is shrunk
# first, each of four steps runs once, the one blur is isotropic, and the ranges are milder: from
# almost nothing, since sampling corrupts nothing, to a visible fault.


def bsr_blur(low, rng):
    """Blur with a random sigma; 0.2 pixels is as good as none."""
    return gaussian_blur(low, kernel=7, sigma=rng.uniform(0.2, 1.2))


def bsr_resize(low, rng):
    """Shrink to 50 .. 100% of the side and enlarge again: finer detail is lost."""
    (h, w), scale = low.shape[-2:], rng.uniform(0.5, 1.0)
    small = max(1, round(h * scale)), max(1, round(w * scale))
    # antialias=True averages before it picks pixels: fine stripes must not become coarse ones.
    low = F.interpolate(low[None], small, mode="bicubic", antialias=True)
    low = F.interpolate(low, (h, w), mode="bicubic")[0]
    return low.clamp(-1, 1)  # bicubic overshoots beside sharp edges


def bsr_noise(low, rng):
    """Add gaussian noise with a std of up to 0.06, which is 8 of the 255 grey levels."""
    noise = rng.standard_normal(tuple(low.shape), dtype=np.float32)
    return (low + rng.uniform(0.0, 0.06) * torch.from_numpy(noise)).clamp(-1, 1)


def bsr_jpeg(low, rng):
    """Save as a JPEG of quality 50 .. 95 and load again: 8x8 blocks, ringing at edges."""
    levels = ((low + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)  # (h, w, 3), 0 .. 255
    file = io.BytesIO()
    Image.fromarray(levels.numpy()).save(file, "JPEG", quality=int(rng.integers(50, 96)))
    levels = torch.from_numpy(np.array(Image.open(file)))
    return levels.permute(2, 0, 1).float() / 127.5 - 1  # (3, h, w), -1 .. 1


BSR_STEPS = (bsr_blur, bsr_resize, bsr_noise, bsr_jpeg)


def degrade_bsr(low, rng):
    """All four BSR steps, each with a random strength, in one of their 24 orders."""
    for k in rng.permutation(4):
        low = BSR_STEPS[k](low, rng)
    return low


DEGRADATIONS = {"none": lambda low, rng: low, "blur": degrade_blur, "some_blur": degrade_some_blur,
                "bsr": degrade_bsr}
# How many pixels around a pixel it looks at. BSR's JPEG has blocks of 8 (16 for colour).
MARGINS = {"none": 0, "blur": 1, "some_blur": 1, "bsr": 8}
