"""The two diffusion upsamplers of unCLIP: 64 -> 256 and 256 -> 1024 (paper sec. 2.1, table 3).

The decoder draws a 64x64 picture. Two more diffusion models enlarge it by 4 each. They see the
small picture and nothing else: no CLIP embedding, no caption, no guidance.

The one idea: **a network without attention runs at any picture size.** A convolution does the same
thing everywhere, so the network is trained on random crops of a quarter of the side (1/16 of the
pixels) and still runs at the full size. One attention layer would break this: it would compare 16
times as many places with each other as it was trained for, at 256 times the cost. (What still sees
the whole picture is group norm; a mean over more pixels is much the same mean.)

The other half is about data. In training the small picture is a real one, shrunk perfectly; in
sampling it is a drawing with small faults of its own. So the small picture is corrupted a little in
training (support/degradations.py), and the upsampler learns not to trust its every pixel.

Letters: B batch; H, W target sides; h, w low-resolution sides; f = H / h the factor; T noise
levels; E timestep embedding. "low" is short for low-resolution picture. Read next: train.py.
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
    crop: int = 64  # side of the training crops, pixels of the target: a quarter of `size`
    channels: int = 32  # of the U-Net's finest level
    multiples: tuple = (1, 2, 3, 4)  # of `channels`, a level; each next level halves the sides
    blocks: int = 1  # residual blocks a level
    stem: int = 1  # the U-Net works on patches of stem x stem pixels as if they were one (faster)
    dropout: float = 0.0
    degradation: str = "blur"  # of the low pictures: one of DEGRADATIONS
    schedule: str = "cosine"  # "cosine" (first), "linear" (second)
    # Paper: noise. Here x_0, as the enlarged low picture plus a correction: training then starts
    # from a plain enlargement instead of grain, which stays for long.
    predict: str = "x_0"
    diffusion_steps: int = 1000  # T
    sample_steps: int = 27  # of DDIM: 27 (first), 15 (second)

    @property
    def factor(self):
        """How many target pixels a low-resolution pixel becomes along a side: f."""
        return self.size // self.low_size

    @property
    def divisor(self):
        """Target sides must be multiples of this, or the U-Net's halvings leave a remainder."""
        return self.stem * 2 ** (len(self.multiples) - 1)

    def __post_init__(self):
        step = math.lcm(self.factor, self.divisor)
        assert self.size % self.low_size == 0 and self.factor >= 2, "size: 2, 3, ... times low_size"
        assert 0 < self.crop <= self.size and self.crop % step == 0, f"crop: a multiple of {step}"
        assert self.degradation in DEGRADATIONS


# --- training pairs --------------------------------------------------------------------------


def area_average(picture, f):
    """Shrink by f: a low-resolution pixel is the mean of its f x f block. (3, H, W) -> (3, h, w).

    Never the nearest pixel: that skips f^2 - 1 of f^2 pixels, and fine stripes become false coarse
    ones (aliasing) which the upsampler would then learn to explain.
    """
    return F.avg_pool2d(picture, f)


def training_pair(dataset, i, config, rng):
    """Cut a random training crop from picture i, and make its degraded low-resolution version.

        window (crop and margin) -> area average -> degrade -> cut the margin off -> low

    The degradation comes *before* the crop. The other way round, the crop's edge would be blurred
    into an invented border, on every training example, and the network would learn that border.
    (One invented border remains: condition() enlarges the crop alone, without its neighbours.)

    dataset: has image(i, size, crop=(top, left, side)) -> (3, side, side) in [-1, 1]
    rng:     numpy Generator; the same state gives the same pair
    Returns target (3, crop, crop) and low (3, crop / f, crop / f), both float32 in [-1, 1].
    """
    f, margin = config.factor, MARGINS[config.degradation]
    side = config.crop // f  # of the crop, in low-resolution pixels
    # Places are drawn in low-resolution pixels: a crop then never starts inside an f x f block.
    top, left = (int(n) for n in rng.integers(0, config.low_size - side + 1, size=2))

    # The window is a square around the crop. At the picture's border it slides inwards: there the
    # degradation meets the picture's true edge, as it does in the whole picture.
    window_side = min(side + 2 * margin, config.low_size)
    window_top = min(max(top - margin, 0), config.low_size - window_side)
    window_left = min(max(left - margin, 0), config.low_size - window_side)
    window = dataset.image(i, config.size, crop=(window_top * f, window_left * f, window_side * f))

    y, x = top - window_top, left - window_left  # the crop's place in the window
    low = DEGRADATIONS[config.degradation](area_average(window, f), rng)[:, y:y + side, x:x + side]
    y, x = y * f, x * f
    target = window[:, y:y + config.crop, x:x + config.crop]
    return target.contiguous(), low.contiguous()  # do not keep the whole window alive


# --- the model -------------------------------------------------------------------------------


class Upsampler(nn.Module):
    """p(high-resolution picture | low-resolution picture) as a diffusion model."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        E = 4 * config.channels
        # The noise level is the only thing the U-Net is told besides its 6 input channels.
        self.time = TimeEmbedding(config.channels, E)
        self.unet = UNet(
            in_channels=3 + 3,  # x_t, and the low picture enlarged to the same size
            out_channels=3,
            channels=config.channels,
            multiples=config.multiples,
            blocks=config.blocks,
            emb_dim=E,
            attention_levels=(),  # none, at any level: see the top of this file
            dropout=config.dropout,
            stem=config.stem,
        ).to(memory_format=torch.channels_last)
        self.diffusion = GaussianDiffusion(
            T=config.diffusion_steps, schedule=config.schedule, predict=config.predict,
            clip_x_0=True,
        )

    def condition(self, low):
        """Enlarge the low picture to the target's size: (B, 3, h, w) -> (B, 3, H, W).

        Bicubic (ADM and GLIDE: bilinear). This blurry enlargement is already most of the answer;
        the network adds the fine detail. H and W must be multiples of the config's divisor.
        """
        return F.interpolate(low.float(), scale_factor=self.config.factor, mode="bicubic")

    def forward(self, x_t, t, cond):
        """The network's output for x_t (B, 3, H, W) at noise levels t (B,) and condition(low)."""
        x = torch.cat([x_t, cond], dim=1)  # (B, 6, H, W)
        out = self.unet(x, self.time(t))  # (B, 3, H, W)
        return cond + out if self.config.predict == "x_0" else out

    # --- training ---

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        """image (B, 3, crop, crop) and low (B, 3, crop / f, crop / f): training pairs, stacked."""
        pairs = [training_pair(data, i, config, rng) for i in indices]
        image, low = zip(*pairs, strict=True)
        return {"image": torch.stack(image), "low": torch.stack(low)}

    def loss(self, batch, t=None):
        """Mean diffusion loss of a batch of training pairs, a scalar. t (B,): by default drawn."""
        network = functools.partial(self, cond=self.condition(batch["low"]))
        return self.diffusion.training_loss(network, batch["image"], t).mean()

    def preview(self, batches):
        """16 validation crops: (PSNR in dB, [input, drawn, target] of each, their names)."""
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

        low:   (B, 3, h, w) in [-1, 1], from the decoder or the upsampler before; any h, w, not only
               low_size. Not corrupted here: only in training
        steps: DDIM steps, evenly spread; None for the config's (paper: 27 and 15, tuned by hand)
        noise, on_step: see diffusion.py
        Returns (B, 3, f * h, f * w) in [-1, 1].
        """
        cond = self.condition(low)
        return self.diffusion.ddim_sample(
            functools.partial(self, cond=cond), cond.shape, steps or self.config.sample_steps,
            noise=noise, on_step=on_step,
        )
