"""The two diffusion upsamplers of unCLIP: 64 -> 256 and 256 -> 1024 (paper sec. 2.1, table 3).

The decoder draws a 64x64 picture. Two more diffusion models enlarge it by 4 each. They see the
small picture and nothing else: no CLIP embedding, no caption, no guidance.

The one idea: **a network without attention runs at any picture size.** A convolution does the same
thing everywhere, so the network can be trained on random crops of a quarter of the side (1/16 of
the pixels) and used at the full size. An attention layer would break this: it would compare 16
times as many places as it was trained for, at 256 times the cost. (Group norm does see the whole
picture, but a mean over more pixels is much the same mean.)

The other half is about data. In training the small picture is a real one, shrunk perfectly; in
sampling it is a drawing with small faults. So it is corrupted a little in training
(support/degradations.py), and the upsampler learns not to trust every pixel.

Letters: B batch; H, W target sides; h, w low-resolution sides; f = H / h the factor; T noise
levels; E timestep embedding. "low" is short for low-resolution picture.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import GaussianDiffusion, SeededNoise
from networks import TimeEmbedding, UNet, evaluating
from support.degradations import DEGRADATIONS, MARGINS


@dataclass(frozen=True)
class UpsamplerConfig:
    # Paper (table 3), first | second: channels 320 | 192, multiples 1,2,3,4 | 1,1,2,2,4,4, blocks
    # 3 | 2, dropout 0.1 | none: 700M | 300M parameters.
    low_size: int = 64  # side of the pictures that come in, pixels
    size: int = 256  # side of the pictures that go out, pixels
    crop: int = 64  # side of the training crops, target pixels. Paper: a quarter of `size`
    channels: int = 32  # of the U-Net's finest level
    multiples: tuple = (1, 2, 3, 4)  # of `channels`, one for each level
    blocks: int = 1  # residual blocks a level
    stem: int = 1  # fold stem x stem pixels into channels first: see UNet
    dropout: float = 0.0
    degradation: str = "blur"  # of the low pictures: one of DEGRADATIONS
    schedule: str = "cosine"  # "cosine" (first), "linear" (second)
    # ADM, GLIDE: noise. Here x_0, as the enlarged low picture plus a correction: training then
    # starts at a plain enlargement instead of grain, which takes long to go.
    predict: str = "x_0"
    diffusion_steps: int = 1000  # T
    sample_steps: int = 27  # of DDIM: 27 (first), 15 (second)

    @property
    def factor(self):  # f
        return self.size // self.low_size


# --- training pairs --------------------------------------------------------------------------


def area_average(picture, f):
    """Shrink by f: a low-resolution pixel is the mean of its f x f block. (3, H, W) -> (3, h, w).

    Picking one pixel of each block instead would turn fine stripes into false coarse ones
    (aliasing), and the upsampler would be trained on those.
    """
    return F.avg_pool2d(picture, f)


def training_pair(dataset, i, config, rng):
    """Cut a random training crop from picture i, and make its degraded low-resolution version.

        window (crop and margin) -> area average -> degrade -> cut the margin off -> low

    The degradation comes *before* the crop. The other way round, the blur would invent what lies
    beyond the crop's edge, in every training example, and the network would learn that.
    (condition() still does: it enlarges the crop alone, without its neighbours.)

    dataset: has image(i, size, crop=(top, left, side)) -> (3, side, side) in [-1, 1]
    rng:     numpy Generator; the same state gives the same pair
    Returns target (3, crop, crop) and low (3, crop / f, crop / f), both float32 in [-1, 1].
    """
    f, margin = config.factor, MARGINS[config.degradation]
    side = config.crop // f  # of the crop, in low-resolution pixels
    # Drawn in low-resolution pixels, so that a crop never starts inside an f x f block.
    top, left = (int(n) for n in rng.integers(0, config.low_size - side + 1, size=2))

    # Exercise begins.
    # The window is a square around the crop. At the picture's border it slides inwards: there the
    # degradation meets the picture's true edge, as it does in the whole picture.
    window_side = min(side + 2 * margin, config.low_size)
    window_top = min(max(top - margin, 0), config.low_size - window_side)
    window_left = min(max(left - margin, 0), config.low_size - window_side)
    window = dataset.image(i, config.size, crop=(window_top * f, window_left * f, window_side * f))

    def cut(picture, f):  # the crop, where a low-resolution pixel has f x f pixels
        y, x, n = f * (top - window_top), f * (left - window_left), f * side
        return picture[:, y:y + n, x:x + n].contiguous()  # do not keep the whole window alive

    low = DEGRADATIONS[config.degradation](area_average(window, f), rng)
    return cut(window, f), cut(low, 1)
    # Exercise ends.


# --- the model -------------------------------------------------------------------------------


class Upsampler(nn.Module):
    """p(high-resolution picture | low-resolution picture) as a diffusion model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        E = 4 * config.channels
        # The noise level is the only thing the U-Net is told besides its 6 input channels: x_t, and
        # the low picture enlarged to the same size. It attends at no level.
        self.time = TimeEmbedding(config.channels, E)
        self.unet = UNet(
            3 + 3, 3, config.channels, config.multiples, config.blocks, E, attention_levels=(),
            dropout=config.dropout, stem=config.stem,
        ).to(memory_format=torch.channels_last)
        # Unlike the decoder's loss, this one is not weighted by noise level.
        self.diffusion = GaussianDiffusion(
            config.diffusion_steps, config.schedule, config.predict)

    def condition(self, low):
        """Enlarge the low picture to the target's size: (B, 3, h, w) -> (B, 3, H, W).

        Bicubic (ADM and GLIDE: bilinear). This blurry enlargement is already most of the answer;
        the network adds the fine detail.
        """
        return F.interpolate(low.float(), scale_factor=self.config.factor, mode="bicubic")

    def forward(self, x_t, t, cond):
        """The network's output for x_t (B, 3, H, W) at noise levels t (B,) and condition(low)."""
        out = self.unet(torch.cat([x_t, cond], dim=1), self.time(t))
        return cond + out if self.config.predict == "x_0" else out

    # --- training ---

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        """image (B, 3, crop, crop) and low (B, 3, crop / f, crop / f): training pairs, stacked."""
        pairs = [training_pair(data, i, config, rng) for i in indices]
        image, low = zip(*pairs, strict=True)
        return {"image": torch.stack(image), "low": torch.stack(low)}

    def loss(self, batch, t=None):
        """Mean diffusion loss of a batch, a scalar. t (B,): noise levels, by default drawn."""
        network = functools.partial(self, cond=self.condition(batch["low"]))
        return self.diffusion.training_loss(network, batch["image"], t).mean()

    def preview(self, batches):
        """(PSNR in dB; input, drawn, target of 16 validation crops; their captions)."""
        batch, _ = batches.look()
        drawn = self.sample(batch["low"], noise=SeededNoise(range(len(batch["low"]))))
        # Pixels span a range of 2, so PSNR = 10 log10(2^2 / mse).
        mse = (drawn - batch["image"]).square().mean().item()
        low = F.interpolate(batch["low"], drawn.shape[-2:], mode="nearest")
        rows = torch.stack([low, drawn, batch["image"]], dim=1).flatten(0, 1)
        return {"psnr": 10 * math.log10(4 / mse)}, rows, ["input", "drawn", "target"] * len(low)

    # --- sampling ---

    @torch.no_grad()
    @evaluating
    def sample(self, low, steps=None, noise=None, on_step=None):
        """Enlarge pictures by the factor f with DDIM, eta 0 (paper table 3).

        low: (B, 3, h, w) in [-1, 1], of any size whose f-fold the U-Net can halve. It is corrupted
        in training only. steps: evenly spread, by default the config's (the paper tuned their
        number by hand, and does not state the spacing).
        Returns (B, 3, f * h, f * w) in [-1, 1].
        """
        cond = self.condition(low)
        network = functools.partial(self, cond=cond)
        return self.diffusion.ddim_sample(network, cond.shape, steps or self.config.sample_steps,
                                          noise=noise, on_step=on_step)
