"""optimizer.py against the singular value decomposition and sums done by hand."""

import pytest
import torch
from torch import nn

from decoder import Decoder, DecoderConfig
from support.muon import MOMENTUM, Muon, make_optimizers, orthogonalise

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


def with_singular_values(rows, columns, values):
    """A random matrix of given singular values: (matrix, U, V^T)."""
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return u * values @ vh, u, vh


def one_step(gradients, lr=0.1):
    """The weights after a Muon step for each gradient, from zero."""
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = Muon([p], lr)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(24, 24), (24, 200), (96, 32)])
def test_orthogonalise_keeps_the_directions_and_makes_all_as_long(shape):
    values = torch.logspace(0, -2, min(shape))  # the longest a hundred times the shortest
    matrix, u, vh = with_singular_values(*shape, values)
    inside = u.T @ orthogonalise(matrix) @ vh.T  # diagonal, if the directions are kept
    diagonal = inside.diagonal()
    assert (inside - diagonal.diag()).abs().max() < 1e-4
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25


def test_orthogonalise_does_not_see_a_matrix_s_length_or_side():
    matrix = torch.randn(12, 40)
    out = orthogonalise(matrix)
    torch.testing.assert_close(orthogonalise(1000 * matrix), out)
    torch.testing.assert_close(orthogonalise(matrix.T), out.T)
    torch.testing.assert_close(orthogonalise(-matrix), -out)
    assert (orthogonalise(torch.zeros(3, 4)) == 0).all()


def test_orthogonalise_is_the_polynomial_of_the_singular_values():
    """Five rounds of 3.4445 s - 4.775 s^3 + 2.0315 s^5, done on the values alone."""
    values = torch.tensor([1.0, 0.5, 0.3, 0.02])
    matrix, u, vh = with_singular_values(4, 9, values)
    s = values.double() / values.double().norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalise(matrix), u * s.float() @ vh, rtol=1e-4, atol=1e-5)


def test_orthogonalise_stays_accurate_in_bfloat16():
    """Eight bits of each number are enough: the step's direction turns by 7 degrees at the most."""
    matrix, _, _ = with_singular_values(96, 400, torch.logspace(0, -3, 96))
    exact = orthogonalise(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = orthogonalise(matrix)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    cosine = (rounded * exact).sum() / rounded.norm() / exact.norm()
    assert cosine > 0.9925


def test_muon_s_first_step_is_as_long_as_lr_says():
    gradient = torch.randn(8, 20)
    torch.testing.assert_close(one_step([gradient]), -0.1 * orthogonalise(gradient))
    tall = torch.randn(36, 4)  # its step is sqrt(36 / 4) = 3 times as long
    torch.testing.assert_close(one_step([tall]), -0.3 * orthogonalise(tall))


def test_muon_s_second_step_looks_ahead_along_the_momentum():
    one, two = torch.randn(2, 6, 10)
    momentum = (1 - MOMENTUM) * MOMENTUM * one + (1 - MOMENTUM) * two
    ahead = MOMENTUM * momentum + (1 - MOMENTUM) * two
    expected = one_step([one]) - 0.1 * orthogonalise(ahead)
    torch.testing.assert_close(one_step([one, two]), expected)


def test_a_convolution_is_a_matrix_in_either_memory_format():
    gradient = torch.randn(6, 5, 3, 3)
    expected = one_step([gradient.flatten(1)]).view(6, 5, 3, 3)
    torch.testing.assert_close(one_step([gradient]), expected)
    last = gradient.to(memory_format=torch.channels_last)
    torch.testing.assert_close(one_step([last]), expected)


def test_parameters_of_one_shape_are_done_together_and_each_gets_its_own():
    gradients = [torch.randn(5, 7), torch.randn(9, 7), torch.randn(5, 7)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients] + [nn.Parameter(torch.ones(2))]
    for p, gradient in zip(params, gradients):  # the last has none: it is left as it is
        p.grad = gradient.clone()
    Muon(params, 0.1).step()
    for p, gradient in zip(params, gradients):
        torch.testing.assert_close(p.detach(), one_step([gradient]))
    assert (params[-1] == 1).all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_agrees_with_torch_s_own():
    """torch.optim.Muon computes in bfloat16, eight bits of a number: so to a few percent."""
    gradients = list(torch.randn(3, 16, 40))
    p = nn.Parameter(torch.zeros(16, 40))
    reference = torch.optim.Muon([p], lr=0.1, momentum=MOMENTUM, weight_decay=0.0)
    for gradient in gradients:
        p.grad = gradient.clone()
        reference.step()
    ours = one_step(gradients)
    assert (ours - p.detach()).norm() < 0.03 * ours.norm()


def test_every_parameter_has_one_optimizer_and_the_ends_have_adam():
    config = DecoderConfig(dim=8, text_width=8, text_len=4, channels=8, multiples=(1, 2),
                           attention_levels=(1,), context_width=32, text_depth=1)
    model = Decoder(config)
    adam, muon = make_optimizers(model, 5.0)
    of = {id(p): name for name, p in model.named_parameters()}
    names = [[of[id(p)] for g in o.param_groups for p in g["params"]] for o in (adam, muon)]
    assert sorted(names[0] + names[1]) == sorted(of.values())
    assert "unet.down.0.res.conv_1.weight" in names[1] and "unet.up.0.res.conv_1.weight" in names[1]
    assert "text_blocks.0.mlp.0.weight" in names[1]
    ends = ["unet.conv_in.weight", "unet.conv_out.weight", "image_to_tokens.weight",
            "null_image_emb", "unet.down.0.res.conv_1.bias", "unet.down.0.res.norm_1.weight"]
    assert set(ends) <= set(names[0])
    assert [o.param_groups[0]["scale"] for o in (adam, muon)] == [1.0, 5.0]
    assert [type(o) for o in make_optimizers(model)] == [torch.optim.AdamW]
