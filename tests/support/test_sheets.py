"""Sheets of pictures."""

import numpy as np
import torch

from support.sheets import draw_grid


def test_long_captions_are_cut():
    assert draw_grid(torch.zeros(1, 3, 16, 16), ["星 word " * 800]).height < 400


def test_grid_shows_each_picture_with_its_caption_under_it():
    pictures = torch.stack([torch.full((3, 128, 128), v) for v in (-1.0, 0.0, 1.0)])
    plain = draw_grid(pictures)
    named = draw_grid(pictures, ["black", "gray", "a very long caption " * 5])
    assert named.height > plain.height and named.width == plain.width == 3 * 132 + 4
    for k, level in enumerate((0, 128, 255)):
        assert abs(named.getpixel((4 + k * 132 + 64, 68))[0] - level) <= 1
    assert np.array(named.crop((4, 132, 136, named.height)).convert("L")).min() < 100
