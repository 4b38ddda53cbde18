"""Pictures as tensors and as sheets."""

import numpy as np
import torch

from support.sheets import draw_grid, to_pil


def test_pixels_have_fixed_limits():
    flat = torch.full((3, 4, 4), -0.5)
    assert to_pil(flat).getpixel((0, 0)) == (64, 64, 64)  # (-0.5 + 1) * 127.5, rounded
    assert to_pil(flat * 10).getpixel((0, 0)) == (0, 0, 0)


def test_grid_shows_each_picture_with_its_caption_under_it():
    pictures = torch.stack([torch.full((3, 128, 128), v) for v in (-1.0, 0.0, 1.0)])
    plain = draw_grid(pictures)
    named = draw_grid(pictures, ["black", "gray", "a very long caption " * 5])
    assert named.height > plain.height and named.width == plain.width == 3 * 132 + 4
    for k, level in enumerate((0, 128, 255)):
        assert abs(named.getpixel((4 + k * 132 + 64, 68))[0] - level) <= 1
    assert np.array(named.crop((4, 132, 136, named.height)).convert("L")).min() < 100
