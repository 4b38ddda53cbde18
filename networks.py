"""What the stages' networks are built of: a transformer for the priors, a U-Net for pictures.

The transformer (GPT-2's block) hands out the keys and values of its tokens and takes those of
earlier tokens back in: the *cache*. That is all it needs to run a sequence in pieces, with the same
result as in one go, as long as its mask is causal. Both priors live on this.

The U-Net (DDPM app. B, ADM, GLIDE) goes down to a small picture with many channels, where it is
cheap to see everything at once, and up again to full detail; skips carry the detail across. Two
things enter it from outside: an embedding, which scales and shifts every residual block, the same
for all pixels; and context tokens, among which each pixel may choose by attention.

Letters: B batch, N tokens, M transformer width, P cached tokens, C channels, H, W picture sides,
E timestep embedding, X context width. Read next: prior.py.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import at_least_float32


def timestep_embedding(t, dim, max_period=10000):
    """Tell a network the time: sines and cosines of t at dim / 2 frequencies (DDPM app. B).

    t: (B,), dim: even. Returns (B, dim) whose squared norm is dim / 2, as sin^2 + cos^2 = 1.
    Fast frequencies (1) tell neighbours apart, slow ones (nearly 1 / max_period) early from late.
    """
    assert dim % 2 == 0
    t = t if t.is_floating_point() else t.float()
    powers = torch.arange(dim // 2, dtype=t.dtype, device=t.device) / (dim // 2)
    angles = t[:, None] * torch.exp(-math.log(max_period) * powers)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)            # (B, dim)


def evaluating(sample):
    """Decorates a model's sample(): it draws in eval mode, without dropout, and the model is then
    back in the mode that it was in, even after an error or Ctrl-C."""
    @functools.wraps(sample)
    def wrapped(self, *args, **settings):
        was_training = self.training
        self.eval()
        try:
            return sample(self, *args, **settings)
        finally:
            self.train(was_training)
    return wrapped


# --- the transformer ------------------------------------------------------------------------


def attention(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v, each query over the keys that mask allows (1706.03762 eq. 1).

    q: (B, heads, N, d), k and v: (B, heads, P + N, d), mask: bool, True = may look, broadcast to
    (B, heads, N, P + N); no query may be left without a key. Returns (B, heads, N, d).

    On a GPU the fused version never writes the (N, P + N) table to memory. On a CPU, at our
    lengths, its backward pass is several times slower than these two lines.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.masked_fill(~mask, -math.inf).softmax(dim=-1).to(v.dtype) @ v


class Block(nn.Module):
    """Pre-norm transformer block (as GPT-2): x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, mask, past=None):
        """x: (B, N, M); mask: (B or 1, N, P + N) bool, True = may look.

        past: (B, 2, heads, P, M / heads), keys and values of P earlier tokens, or None (P = 0).
        Returns x (B, N, M) and the new tokens' own keys and values (B, 2, heads, N, M / heads).
        """
        B, N, M = x.shape
        # One matrix gives queries, keys and values, each (B, heads, N, M / heads).
        qkv = self.qkv(self.norm_1(x)).view(B, N, 3, self.heads, M // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        own = torch.stack([k, v], dim=1)
        if past is not None:
            # In front of our own keys and values go those of the tokens before us.
            k, v = torch.cat([past[:, 0], k], dim=2), torch.cat([past[:, 1], v], dim=2)
        y = attention(q, k, v, mask[:, None])  # (B, heads, N, .)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, M))
        return x + self.mlp(self.norm_2(x)), own


def run_blocks(blocks, x, mask, past=None):
    """All blocks in turn. past and the result's second part: (B, depth, 2, heads, N, M / heads).

    The cache is one tensor with the batch first, so that guidance can stack the caches of its
    two branches like any other condition.
    """
    kept = []
    for depth, block in enumerate(blocks):
        x, own = block(x, mask, None if past is None else past[:, depth])
        kept.append(own)
    return x, torch.stack(kept, dim=1)


def causal_mask(key_mask):
    """(B, N) bool, which tokens are real -> (B, N, N): look at real tokens up to yourself.

    Every token may look at itself, also a padding token that nobody else looks at: a row of a
    softmax with nothing to look at would be 0 / 0.
    """
    N = key_mask.shape[1]
    causal = torch.ones(N, N, dtype=torch.bool, device=key_mask.device).tril()
    return (causal & key_mask[:, None]) | torch.eye(N, dtype=torch.bool, device=key_mask.device)


# --- the U-Net's parts -----------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, E): sines and cosines, then a small network (DDPM appendix B)."""

    def __init__(self, dim, emb_dim):
        super().__init__()
        self.dim = dim
        self.net = nn.Sequential(nn.Linear(dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

    def forward(self, t):
        return self.net(timestep_embedding(t, self.dim).to(self.net[0].weight.dtype))


class GroupNorm(nn.GroupNorm):
    """In float32, also where the network runs in bfloat16: autocast does so on GPUs, but not on
    CPUs, where PyTorch's bfloat16 group norm is many times slower when channels come last."""

    def forward(self, x):
        return super().forward(at_least_float32(x)).to(x.dtype)


def group_norm(channels):
    """At most 32 groups (ADM) and at least 4 channels in each: our networks are narrow."""
    return GroupNorm(math.gcd(32, channels // 4), channels)


def zero(module):
    """Start a layer at zero: each residual branch begins as the identity (ADM)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """Two convolutions and a skip; the embedding scales and shifts a norm (ADM sec. 3.1).

    Why after a norm? It has just removed the features' own mean and size, so what the embedding
    puts in their place is seen, whatever the features were.
    """

    def __init__(self, c_in, c_out, emb_dim, dropout=0.0):
        super().__init__()
        self.norm_1, self.conv_1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out)
        self.norm_2, self.dropout = group_norm(c_out), nn.Dropout(dropout)
        self.conv_2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        """x (B, c_in, H, W), emb (B, E) -> (B, c_out, H, W)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Every pixel looks at the context tokens and at every pixel (GLIDE sec. 4.1).

    One softmax over both: context keys and values are put in front of the picture's own.
    """

    def __init__(self, channels, head_channels, context_dim):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_dim, 2 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x, context, context_mask):
        """x (B, C, H, W), context (B, N, X), context_mask (B, N) bool -> (B, C, H, W)."""
        B, C, H, W = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (B, H * W, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=-1)
        context_k, context_v = self.context_kv(context).chunk(2, dim=-1)
        k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)
        q, k, v = (y.view(B, -1, self.heads, C // self.heads).transpose(1, 2) for y in (q, k, v))
        # Padding tokens of the context are not looked at; pixels always are.
        mask = F.pad(context_mask, (0, H * W), value=True)[:, None, None]  # (B, 1, 1, N + H * W)
        y = attention(q, k, v, mask)
        y = self.out(y.transpose(1, 2).reshape(B, H * W, C))
        return x + y.transpose(1, 2).view(B, C, H, W)


class Level(nn.Module):
    """A residual block, and attention where the resolution is low enough to afford it."""

    def __init__(self, c_in, c_out, emb_dim, dropout, attend):
        super().__init__()
        self.res = ResBlock(c_in, c_out, emb_dim, dropout)
        self.attention = Attention(c_out, **attend) if attend else None

    def forward(self, x, emb, context, context_mask):
        x = self.res(x, emb)
        return x if self.attention is None else self.attention(x, context, context_mask)


class UNet(nn.Module):
    """Down, across and up again, with a skip from each step down to its step up (DDPM appendix B).

    channels, multiples: level i has channels * multiples[i] channels, its side is H / (stem * 2^i).
    blocks: residual blocks a level going down (one more going up). attention_levels: the levels
    that attend; () builds no attention at all. stem: pixel_unshuffle by this much first and
    pixel_shuffle last, so that a large picture is worked on as a smaller one with more channels.
    ADM and GLIDE halve and double inside residual blocks; here a plain convolution does it.
    """

    def __init__(self, in_channels, out_channels, channels, multiples, blocks, emb_dim,
                 attention_levels=(), head_channels=32, context_dim=None, dropout=0.0,
                 stem=1):
        super().__init__()
        self.stem = stem
        attend = {"head_channels": head_channels, "context_dim": context_dim}
        widths = [channels * m for m in multiples]
        self.conv_in = nn.Conv2d(in_channels * stem**2, widths[0], 3, padding=1)

        self.down, skips, c = nn.ModuleList(), [widths[0]], widths[0]
        for i, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(
                    Level(c, width, emb_dim, dropout, attend if i in attention_levels else None)
                )
                c = width
                skips.append(c)
            if i < len(widths) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)

        in_middle = attend if len(widths) - 1 in attention_levels else None
        self.middle = nn.ModuleList(
            [Level(c, c, emb_dim, dropout, in_middle), Level(c, c, emb_dim, dropout, None)]
        )

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                c_in = c + skips.pop()
                self.up.append(
                    Level(c_in, width, emb_dim, dropout, attend if i in attention_levels else None)
                )
                c = width
            if i > 0:
                # ADM keeps c channels here. Narrowing at once to the finer level's saves about as
                # much as all of that level's way up costs.
                self.up.append(nn.Conv2d(c, widths[i - 1], 3, padding=1))
                c = widths[i - 1]

        self.norm_out = group_norm(c)
        self.conv_out = zero(nn.Conv2d(c, out_channels * stem**2, 3, padding=1))

    def forward(self, x, emb, context=None, context_mask=None):
        """x (B, in_channels, H, W), emb (B, E), context (B, N, X), context_mask (B, N) bool.

        Returns (B, out_channels, H, W). H and W: multiples of stem * 2^(levels - 1).
        """
        x = F.pixel_unshuffle(x, self.stem) if self.stem > 1 else x
        # Channels last in memory: what convolutions on CPUs and tensor cores like best.
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for layer in self.down:
            x = layer(x, emb, context, context_mask) if isinstance(layer, Level) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, emb, context, context_mask)
        for layer in self.up:
            if isinstance(layer, Level):
                x = layer(torch.cat([x, skips.pop()], dim=1), emb, context, context_mask)
            else:
                x = layer(F.interpolate(x, scale_factor=2, mode="nearest"))
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.stem) if self.stem > 1 else x
