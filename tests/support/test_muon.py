"""Claims about Muon, against the singular value decomposition and sums done by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from clip_model import SmallClip, SmallClipConfig
from decoder import Decoder, DecoderConfig
from support.muon import MOMENTUM, Muon, make_optimizers, orthogonalise

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def steps(gradients):
    """The weights after a step for each gradient, from zero."""
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = Muon([p], lr=0.1)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(24, 200), (96, 32)])
def test_orthogonalise_is_the_polynomial_of_the_singular_values(shape):
    """Five rounds of 3.4445 s - 4.775 s^3 + 2.0315 s^5, done on the values alone."""
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2, min(shape))  # the longest a hundred times the shortest
    s = values.double() / values.double().norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert 0.65 < s.min() and s.max() < 1.25  # all directions are about equally long
    expected = u * s.float() @ vh
    for scale in (1, 1000, -1):  # only the direction counts
        out = orthogonalise(scale * (u * values @ vh))
        assert_close(out, expected * (scale / abs(scale)), rtol=1e-3, atol=1e-4)


def test_orthogonalise_stays_accurate_in_bfloat16():
    matrix = torch.randn(96, 400) * torch.logspace(0, -3, 96)[:, None]
    exact = orthogonalise(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = orthogonalise(matrix)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded.ravel(), exact.ravel(), dim=0) > 0.9925  # 7 degrees


def test_a_step_is_as_long_as_lr_says_and_sees_a_convolution_as_a_matrix():
    tall = torch.randn(36, 2, 2, 1)  # a step of a matrix 36 x 4 is sqrt(36 / 4) = 3 times as long
    expected = -0.3 * orthogonalise(tall.flatten(1)).view(36, 2, 2, 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_close(steps([tall.to(memory_format=memory_format)]), expected)


def test_the_second_step_looks_ahead_along_the_momentum():
    one, two = torch.randn(2, 6, 10)
    assert_close(steps([one]), -0.1 * orthogonalise(one))
    momentum = (1 - MOMENTUM) * MOMENTUM * one + (1 - MOMENTUM) * two
    ahead = MOMENTUM * momentum + (1 - MOMENTUM) * two
    assert_close(steps([one, two]), steps([one]) - 0.1 * orthogonalise(ahead))


def test_each_parameter_gets_its_own_step_and_none_without_a_gradient():
    gradients = [torch.randn(5, 7), torch.randn(9, 7), torch.randn(5, 7), torch.zeros(3, 4)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    still = nn.Parameter(torch.ones(5, 7))
    for p, gradient in zip(params, gradients):
        p.grad = gradient
    Muon([*params, still], 0.1).step()
    for p, gradient in zip(params, gradients):
        assert_close(p.detach(), steps([gradient]))
    assert (params[-1] == 0).all() and (still == 1).all()  # no NaN


def test_every_parameter_has_one_optimizer_and_the_ends_have_adam():
    model = Decoder(DecoderConfig(dim=8, text_width=8, text_len=4, channels=8, multiples=(1, 2),
                                  attention_levels=(1,), context_width=32, text_depth=1,
                                  vocab_size=9))
    of = {id(p): name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, 5.0)
    decaying, others, muon = ([of[id(p)] for p in group["params"]]
                              for o in optimizers for group in o.param_groups)
    adam = decaying + others
    assert sorted(adam + muon) == sorted(of.values())
    assert optimizers[0].param_groups[1]["weight_decay"] == 0
    assert {"unet.conv_in.weight", "image_to_time.weight"} <= set(decaying)
    assert {"text_position", "text_in.weight", "text_norm.weight",
            "unet.conv_in.bias"} <= set(others)  # text_in: a table of words
    assert {"unet.down.0.res.conv_1.weight", "text_blocks.0.mlp.0.weight"} <= set(muon)
    assert {"unet.conv_in.weight", "unet.conv_out.weight", "null_image_emb",
            "unet.down.0.res.conv_1.bias", "unet.down.0.res.norm_1.weight"} <= set(adam)
    assert [o.param_groups[0]["scale"] for o in optimizers] == [1.0, 5.0]
    assert [type(o) for o in make_optimizers(model)] == [torch.optim.AdamW]


def test_the_blocks_of_clips_resnet_are_stacks_too_and_its_first_convolutions_are_not():
    model = SmallClip(SmallClipConfig(vocab=(0, 1, 2), dim=16, image_size=32, vision_width=8,
                                      text_width=16, text_layers=1, text_heads=2))
    of = {id(p): name for name, p in model.named_parameters()}
    muon = {of[id(p)] for p in make_optimizers(model, 20.0)[1].param_groups[0]["params"]}
    assert {"model.visual.layer1.0.conv2.weight", "model.visual.layer4.0.downsample.0.weight",
            "model.transformer.resblocks.0.mlp.c_fc.weight"} <= muon
    assert not any(name.startswith("model.visual.conv") or "bn" in name for name in muon)
