"""What the stages' networks are built of: a transformer for the priors, a U-Net for pictures.

The transformer (GPT-2's block) returns the keys and values of its tokens and accepts those of
earlier tokens: the *cache*. With a causal mask, a sequence run in pieces then gives the same result
as in one go, so what does not change is run only once. That makes both priors fast.

The U-Net (DDPM app. B, ADM, GLIDE) goes down to a small picture with many channels, where it is
cheap to see everything at once, and up again to full detail; skips carry the detail across. Two
things enter it from outside: an embedding, which scales and shifts the features of every residual
block, the same for all pixels; and context tokens, from which each pixel picks by attention.

Letters: B batch, N tokens, M transformer width, P cached tokens, L caption tokens, D embedding,
C channels, H, W picture sides (W also CLIP's text width), E timestep embedding, X context width.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import at_least_float32


def timestep_embedding(t, dim):
    """Tell a network the time: cosines and sines of t (B,) at dim / 2 frequencies (DDPM app. B).

    The highest frequency, 1, tells neighbours apart; the lowest, nearly 1 / 10000, early from late.
    Returns (B, dim), of squared norm dim / 2, as cos^2 + sin^2 = 1.
    """
    t = at_least_float32(t)
    powers = torch.arange(dim // 2, dtype=t.dtype, device=t.device) / (dim // 2)
    angles = t[:, None] * torch.exp(-math.log(10000) * powers)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def evaluating(sample):
    """Decorator of a model's sample(): draws in eval mode, without dropout; restores the mode."""
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

    q: (B, heads, N, d); k, v: (B, heads, P + N, d); mask: bool, True = may look, broadcast to
    (B, heads, N, P + N). Every query needs a key. Returns (B, heads, N, d).
    """
    # On a GPU the fused version never writes the (N, P + N) table to memory. On a CPU, at our
    # lengths, its backward pass is several times slower than the last two lines.
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # Exercise begins.
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return logits.masked_fill(~mask, -math.inf).softmax(dim=-1).to(v.dtype) @ v
    # Exercise ends.


class Block(nn.Module):
    """Pre-norm transformer block (as GPT-2): x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        hidden = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x, mask, past=None):
        """x: (B, N, M); mask: (B or 1, N, P + N) bool, True = may look.

        past: (B, 2, heads, P, M / heads), keys and values of P earlier tokens, or None (P = 0).
        Returns x (B, N, M) and the new tokens' own keys and values (B, 2, heads, N, M / heads).
        """
        B, N, M = x.shape
        # Queries, keys and values, each (B, heads, N, M / heads), come from one matrix.
        qkv = self.qkv(self.norm_1(x)).view(B, N, 3, self.heads, M // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        own = torch.stack([k, v], dim=1)
        if past is not None:
            # The keys and values of earlier tokens go in front of the new ones.
            k, v = torch.cat([past[:, 0], k], dim=2), torch.cat([past[:, 1], v], dim=2)
        y = attention(q, k, v, mask[:, None])  # (B, heads, N, .)
        x = x + self.out(y.transpose(1, 2).reshape(B, N, M))
        return x + self.mlp(self.norm_2(x)), own


def run_blocks(blocks, x, mask, past=None):
    """All blocks in turn: x (B, N, M) and the new tokens' cache (B, depth, 2, heads, N, M / heads).

    past: the cache of earlier tokens. It is one tensor with the batch first, so that guidance can
    stack the caches of its two branches like any other condition.
    """
    kept = []
    for depth, block in enumerate(blocks):
        x, own = block(x, mask, None if past is None else past[:, depth])
        kept.append(own)
    return x, torch.stack(kept, dim=1)


def causal_mask(key_mask):
    """(B, N) bool, which tokens are real -> (B, N, N): look at real tokens up to yourself. Padding
    tokens are looked at by themselves alone, as a softmax over nothing would be 0 / 0."""
    itself = torch.eye(key_mask.shape[1], dtype=torch.bool, device=key_mask.device)
    return torch.ones_like(itself).tril() & key_mask[:, None] | itself


class CaptionPrefix(nn.Module):
    """[caption tokens] [text embedding] as transformer tokens, with which both priors begin."""

    def __init__(self, config):
        super().__init__()
        D, M = config.dim, config.width
        self.text_enc_in, self.text_emb_in = nn.Linear(config.text_width, M), nn.Linear(D, M)
        self.null_text_emb = nn.Parameter(torch.randn(D) / math.sqrt(D))
        self.position = nn.Parameter(0.02 * torch.randn(config.text_len + 1, M))

    def forward(self, text_emb, text_enc, text_mask, keep=None):
        """text_emb (B, D), text_enc (B, L, W), text_mask (B, L) -> tokens (B, P, M), mask (B, P).

        Where keep (B,) is False, the caption is dropped, and nothing else: its tokens are masked
        out, and a learned vector replaces the text embedding.
        """
        if keep is not None:
            text_emb = torch.where(keep[:, None], text_emb, self.null_text_emb.to(text_emb.dtype))
            text_mask = text_mask & keep[:, None]
        text_emb = text_emb * math.sqrt(text_emb.shape[-1])  # unit norm -> entries of size 1
        tokens = torch.cat([self.text_enc_in(text_enc), self.text_emb_in(text_emb)[:, None]], dim=1)
        # A batch may pad its captions to less than L; the text embedding keeps the last position.
        position = torch.cat([self.position[: text_enc.shape[1]], self.position[-1:]])
        return tokens + position, F.pad(text_mask, (0, 1), value=True)


# --- the U-Net's parts -----------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, E): cosines and sines, then a small network (DDPM app. B)."""

    def __init__(self, dim, emb_dim):
        super().__init__()
        self.dim = dim
        self.net = nn.Sequential(nn.Linear(dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

    def forward(self, t):
        return self.net(timestep_embedding(t, self.dim).to(self.net[0].weight.dtype))


class GroupNorm(nn.GroupNorm):
    """At most 32 groups, as in ADM, with at least 4 channels each, as our networks are narrow."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels // 4), channels)

    def forward(self, x):
        # Autocast keeps norms in float32 on GPUs. It does not on CPUs, where PyTorch's bfloat16
        # group norm is many times slower when channels come last.
        return super().forward(at_least_float32(x)).to(x.dtype)


def zero(module):
    """Start a layer at zero: each residual branch begins as the identity (ADM)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """Two convolutions and a skip; the embedding scales and shifts a norm (ADM sec. 3.1).

    Why after a norm? The norm has just removed the features' own mean and size, so the mean and
    size that the embedding sets always count, whatever the features were.
    """

    def __init__(self, c_in, c_out, emb_dim, dropout=0.0):
        super().__init__()
        self.norm_1, self.conv_1 = GroupNorm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out)
        self.norm_2, self.dropout = GroupNorm(c_out), nn.Dropout(dropout)
        self.conv_2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        """x (B, c_in, H, W), emb (B, E) -> (B, c_out, H, W)."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Each pixel looks at the context tokens and at all pixels, in one softmax (GLIDE sec. 4.1)."""

    def __init__(self, channels, head_channels, context_dim):
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = GroupNorm(channels)
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
        # All pixels may be looked at, but no padding tokens.
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
    """Down, across and up again, with a skip from each step down to its step up (DDPM app. B).

    Level i has channels * multiples[i] channels and sides of H / (stem * 2^i), with `blocks`
    residual blocks going down and one more going up; those in attention_levels attend.
    stem: fold patches of stem x stem pixels into channels first, and unfold them last: faster.
    ADM and GLIDE halve and double inside residual blocks; here a plain convolution does it.
    """

    def __init__(self, in_channels, out_channels, channels, multiples, blocks, emb_dim,
                 attention_levels=(), head_channels=32, context_dim=None, dropout=0.0, stem=1):
        super().__init__()
        self.stem = stem

        def level(c_in, c_out, i):
            attend = {"head_channels": head_channels, "context_dim": context_dim}
            return Level(c_in, c_out, emb_dim, dropout, attend if i in attention_levels else None)

        widths, last = [channels * m for m in multiples], len(multiples) - 1
        finer = [widths[0]] + widths[:-1]  # for each level, the width of the next finer one
        self.conv_in = nn.Conv2d(in_channels * stem**2, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.extend(level(c, width, i) for c in [finer[i]] + [width] * (blocks - 1))
            if i < last:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))

        self.middle = nn.ModuleList([level(width, width, last), level(width, width, None)])

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            # The skips: from this level's blocks, and from the layer that comes before them.
            self.up.extend(level(width + skip, width, i) for skip in [width] * blocks + [finer[i]])
            if i > 0:
                # ADM keeps the width here. Narrowing it at once to the finer level's saves about
                # as much as that level's whole way up costs.
                self.up.append(nn.Conv2d(width, finer[i], 3, padding=1))

        self.norm_out = GroupNorm(widths[0])
        self.conv_out = zero(nn.Conv2d(widths[0], out_channels * stem**2, 3, padding=1))

    def forward(self, x, emb, context=None, context_mask=None):
        """x (B, in_channels, H, W), emb (B, E), context (B, N, X), context_mask (B, N) bool ->
        (B, out_channels, H, W). H and W: multiples of stem * 2^(levels - 1)."""
        x = F.pixel_unshuffle(x, self.stem) if self.stem > 1 else x
        # Channels last in memory: convolutions on CPUs and on tensor cores are fastest so.
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
