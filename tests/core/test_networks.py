"""Claims about networks.py: time embedding, transformer and its cache, attention, U-Net."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from helpers import differs, flags, randomise
from networks import (
    Attention, Block, GroupNorm, ResBlock, TimeEmbedding, UNet, attention, causal_mask, evaluating,
    run_blocks, timestep_embedding,
)

M, E, X = 32, 32, 32  # widths: transformer, timestep embedding, context
SHAPE = dict(channels=8, multiples=(1, 2), blocks=1, emb_dim=E)  # of a small U-Net

pytestmark = pytest.mark.usefixtures("same_numbers_on_one_thread")


# --- the time, the mode ---------------------------------------------------------------------------


def test_timestep_embedding_holds_the_cosine_and_sine_of_each_frequency():
    t = torch.tensor([0, 3, 999])
    expected = [[g(n * 1e4 ** (-i / 6)) for g in (math.cos, math.sin) for i in range(6)]
                for n in t.tolist()]
    embedding = timestep_embedding(t.double(), 12)
    assert_close(embedding, torch.tensor(expected, dtype=torch.float64))
    assert_close(timestep_embedding(t, 12), embedding.float(), rtol=0, atol=1e-4)
    module = TimeEmbedding(12, E)
    assert_close(module(t), module.net(embedding.float()), rtol=0, atol=1e-4)


def test_timestep_embedding_has_squared_norm_half_the_dimension():
    embedding = timestep_embedding(torch.arange(1000), 22)
    assert_close(embedding.square().sum(1), torch.full((1000,), 11.0))


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Dropout()

    @evaluating
    def sample(self, fails=False):
        if fails:
            raise KeyboardInterrupt
        return self.training or self.part.training


@pytest.mark.parametrize("training", [True, False])
def test_a_model_draws_in_eval_mode_and_is_then_as_it_was(training):
    model = Drawing().train(training)
    assert model.sample() is False and model.training == model.part.training == training
    with pytest.raises(KeyboardInterrupt):
        model.sample(fails=True)
    assert model.training == model.part.training == training


# --- the transformer ------------------------------------------------------------------------------


def test_attention_on_a_cpu_is_the_fused_one_of_gpus():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = torch.rand(2, 1, 5, 9) < 0.5
    mask[..., 0] = True  # no query without a key
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(attention(q, k, v, mask), fused)


def test_block_equals_torchs_own_pre_norm_transformer_layer():
    block = Block(M, heads=4).eval()
    torchs = nn.TransformerEncoderLayer(
        M, 4, 4 * M, dropout=0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    torchs.self_attn.in_proj_weight.data.copy_(block.qkv.weight)
    torchs.self_attn.in_proj_bias.data.copy_(block.qkv.bias)
    for ours, theirs in (
        (block.out, torchs.self_attn.out_proj),
        (block.mlp[0], torchs.linear1),
        (block.mlp[2], torchs.linear2),
        (block.norm_1, torchs.norm1),
        (block.norm_2, torchs.norm2),
    ):
        nn.init.normal_(ours.bias)
        theirs.load_state_dict(ours.state_dict())
    x, mask = torch.randn(2, 7, M), torch.ones(7, 7, dtype=torch.bool).tril()
    with torch.no_grad():  # torch's mask says who may *not* look
        assert_close(block(x, mask[None])[0], torchs(x, src_mask=~mask), rtol=0, atol=1e-5)


def test_causal_mask_shows_real_tokens_up_to_oneself():
    wanted = [
        [1, 0, 0, 0],
        [1, 1, 0, 0],  # a padding token sees itself, or its softmax would be 0 / 0
        [1, 0, 1, 0],  # nobody else sees it
        [1, 0, 1, 1],
    ]
    mask = causal_mask(flags([1, 0, 1, 0]))[0]
    assert_close(mask, torch.tensor(wanted, dtype=torch.bool))


def test_changing_a_token_changes_the_outputs_from_it_on_and_none_before():
    blocks, N = [randomise(Block(M, heads=4)) for _ in range(2)], 6
    x, mask = torch.randn(1, N, M), causal_mask(torch.ones(1, N, dtype=torch.bool))
    with torch.no_grad():
        before = run_blocks(blocks, x, mask)[0][0]
        for j in range(N):
            changed = x.clone()
            changed[0, j] = torch.randn(M)
            after = run_blocks(blocks, changed, mask)[0][0]
            assert_close(after[:j], before[:j], rtol=0, atol=1e-6)
            assert differs(after[j:], before[j:])


# --- the U-Net's parts ----------------------------------------------------------------------------


def test_picture_attention_is_one_softmax_over_unmasked_context_and_pixels():
    C, heads, B, N, H = 16, 2, 2, 5, 3
    layer = randomise(Attention(C, C // heads, X)).double()
    x, context = torch.randn(B, C, H, H).double(), torch.randn(B, N, X).double()
    mask = flags([1, 1, 0, 1, 0], [1, 1, 1, 1, 0])
    wanted = x.clone()
    for b in range(B):  # the plain way: one head, one list of things to look at, no batches
        normed = F.group_norm(
            x[b:b + 1], layer.norm.num_groups, layer.norm.weight, layer.norm.bias
        )
        pixels = normed[0].permute(1, 2, 0).reshape(H * H, C)
        q, k, v = (
            pixels @ w.T + c for w, c in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3))
        )
        tokens = context[b, mask[b]]  # masked tokens do not exist at all
        halves = zip(layer.context_kv.weight.chunk(2), layer.context_kv.bias.chunk(2))
        context_k, context_v = (tokens @ w.T + c for w, c in halves)
        k, v = torch.cat([context_k, k]), torch.cat([context_v, v])
        y = []
        for h in range(heads):
            part = slice(h * C // heads, (h + 1) * C // heads)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(C / heads)).softmax(dim=1)
            y.append(weights @ v[:, part])
        wanted[b] += layer.out(torch.cat(y, dim=1)).T.view(C, H, H)
    assert_close(layer(x, context, mask), wanted, rtol=0, atol=1e-10)


def test_residual_block_is_scaled_and_shifted_by_the_embedding():
    block = randomise(ResBlock(8, 16, E))
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, E)
    h = F.conv2d(F.silu(block.norm_1(x)), block.conv_1.weight, block.conv_1.bias, padding=1)
    scale, shift = (F.silu(emb) @ block.emb.weight.T + block.emb.bias).chunk(2, dim=1)
    h = h.view(2, block.norm_2.num_groups, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = h.view(2, 16, 6, 6) * block.norm_2.weight[:, None, None] + block.norm_2.bias[:, None, None]
    h = h * (1 + scale[..., None, None]) + shift[..., None, None]
    wanted = block.skip(x) + F.conv2d(F.silu(h), block.conv_2.weight, block.conv_2.bias, padding=1)
    assert_close(block(x, emb), wanted, rtol=0, atol=1e-5)


def test_group_norm_is_done_in_float32_whatever_the_network_runs_in(monkeypatch):
    seen, real = [], F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: seen.append(x.dtype) or real(x, *rest))
    layer, x = randomise(GroupNorm(16)), 3 + 5 * torch.randn(2, 16, 4, 4)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        out = layer.to(torch.promote_types(dtype, torch.float32))(x.to(dtype))
        assert out.dtype == dtype
        parts = x.to(dtype).double().view(2, layer.num_groups, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / parts.std(2, keepdim=True, unbiased=False)
        wanted = parts.view_as(x) * layer.weight[:, None, None] + layer.bias[:, None, None]
        tolerance = 0.01 if dtype == torch.bfloat16 else 1e-4
        assert_close(out.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    assert seen == [torch.float32, torch.float32, torch.float64]


# --- the U-Net ------------------------------------------------------------------------------------


def test_fresh_residual_branches_are_the_identity_and_a_fresh_unet_answers_exactly_zero():
    x, emb, context = torch.randn(2, 8, 4, 4), torch.randn(2, E), torch.randn(2, 3, X)
    assert_close(ResBlock(8, 8, E)(x, emb), x, rtol=0, atol=0)
    assert_close(Attention(8, 8, X)(x, context, flags([1] * 3, [1] * 3)), x, rtol=0, atol=0)
    assert_close(UNet(8, 5, **SHAPE)(x, emb), torch.zeros(2, 5, 4, 4), rtol=0, atol=0)


def test_each_step_up_sees_the_output_of_its_step_down():
    unet = randomise(UNet(3, 5, **SHAPE))
    x, emb = torch.randn(2, 3, 8, 8), torch.randn(2, E)
    res = [level.res for level in (*unet.down, *unet.middle, *unet.up) if hasattr(level, "res")]
    a = unet.conv_in(x)  # (2, 8, 8, 8)
    b = res[0](a, emb)
    c = unet.down[1](b)  # (2, 8, 4, 4)
    d = res[1](c, emb)  # (2, 16, 4, 4)
    y = res[3](res[2](d, emb), emb)  # across
    y = res[4](torch.cat([y, d], 1), emb)
    y = res[5](torch.cat([y, c], 1), emb)
    y = unet.up[2](y.repeat_interleave(2, 2).repeat_interleave(2, 3))  # (2, 8, 8, 8)
    y = res[6](torch.cat([y, b], 1), emb)
    y = res[7](torch.cat([y, a], 1), emb)
    wanted = unet.conv_out(F.silu(unet.norm_out(y)))
    assert_close(unet(x, emb), wanted, rtol=0, atol=1e-5)
    assert (unet.up[2].in_channels, unet.up[2].out_channels) == (16, 8)


def space_to_depth(x, n):
    """pixel_unshuffle by n, written out: each n x n patch becomes n^2 channels."""
    patches = [x[..., i::n, j::n] for i in range(n) for j in range(n)]
    return torch.stack(patches, dim=2).flatten(1, 2)


@pytest.mark.parametrize("stem", [2, 4])
def test_a_unet_with_a_stem_is_the_same_network_on_patches(stem):
    with_stem = randomise(UNet(3, 5, **SHAPE, stem=stem))
    plain = UNet(3 * stem**2, 5 * stem**2, **SHAPE).eval()
    plain.load_state_dict(with_stem.state_dict())
    x, emb = torch.randn(2, 3, 16, 16), torch.randn(2, E)
    wanted = plain(space_to_depth(x, stem), emb)
    assert_close(space_to_depth(with_stem(x, emb), stem), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("levels, sides", [((), []), ((0,), [8, 8, 8]), ((1,), [4, 4, 4, 4])])
def test_a_unet_attends_at_the_levels_asked_for_and_builds_no_other_attention(levels, sides):
    # Once going down, once in the middle if that is the coarsest level, twice going up.
    unet, seen = UNet(3, 3, **SHAPE, attention_levels=levels, head_channels=8, context_dim=X), []
    for module in unet.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    unet(torch.randn(1, 3, 8, 8), torch.randn(1, E), torch.randn(1, 2, X), flags([1, 1]))
    assert seen == sides
    assert sum(isinstance(m, Attention) for m in unet.modules()) == len(sides)
