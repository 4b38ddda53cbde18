"""The prior: from a caption to a CLIP image embedding, P(z_i | y)  (paper sec. 2.2).

A caption does not determine a picture, and CLIP's text embedding is not an image embedding: the
two live in different parts of the sphere. The prior draws, for a caption, one of the image
embeddings that a picture with this caption could have. The paper has two. The autoregressive one,
at the end of this file, spells the embedding as a sentence of codes. The other is a diffusion
model whose "pixels" are the D numbers of an embedding and whose network is a causal transformer:

    [caption tokens, L] [text embedding] | [timestep] [noised image embedding] [query] -> z_i
    <------ the prefix: P = L + 1 ----->   <--------- the suffix: 3 tokens --------->

The one idea of this file: the mask is causal and the caption comes first, so the prefix knows
nothing of t or of the noised embedding. Its keys and values are therefore computed *once* per
caption: sampling runs 64 steps of three tokens each, and training lets K noised copies of an
embedding, each at its own t, share one prefix. The autoregressive prior keeps it just so.

Letters: B batch, D CLIP embedding, L caption tokens, W width of CLIP's token features,
M width of this transformer, P prefix length, K noised copies, T steps,
C principal components, and as many codes.
Read next: decoder.py, which turns the embedding into pixels.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import GaussianDiffusion, guided
from networks import Block, causal_mask, run_blocks, timestep_embedding

# --- what both priors do with a caption ------------------------------------------------------


def embedding_scale(dim):
    """Unit-norm embeddings times this have a standard deviation of about 0.54 a dimension.

    The paper multiplies 1024-d embeddings by 17.2 "to match the variance of RGB pixels": each
    dimension of a unit vector has a mean square of 1 / D, and 17.2 / sqrt(1024) = 0.54.
    """
    return 17.2 * math.sqrt(dim / 1024)


@dataclass(frozen=True)
class PriorConfig:
    dim: int  # D, size of CLIP's embeddings
    text_width: int  # W, width of CLIP's token features
    text_len: int  # L, CLIP's context length
    width: int = 256  # M. Paper: 2048, 24 blocks, 32 heads. We: small. Because: one machine.
    depth: int = 4
    heads: int = 4
    predict: str = "x_0"  # "noise" shows why the paper predicts x_0 (sec. 2.2)
    variance: str = "analytic"  # of sampling; or "fixed_small", "fixed_large"
    copies: int = 4  # K noised copies of an embedding on one caption prefix, in training
    drop_text: float = 0.1  # share of examples trained without their caption
    diffusion_steps: int = 1000  # T
    sample_steps: int = 64


class CaptionPrefix(nn.Module):
    """[caption tokens] [text embedding] as tokens of the transformer, with a null caption."""

    def __init__(self, config):
        super().__init__()
        M = config.width
        self.text_enc_in = nn.Linear(config.text_width, M)
        self.text_emb_in = nn.Linear(config.dim, M)
        self.null_text_emb = nn.Parameter(torch.randn(config.dim) / math.sqrt(config.dim))
        self.position = nn.Parameter(0.02 * torch.randn(config.text_len + 1, M))

    def forward(self, text_emb, text_enc, text_mask, keep=None):
        """text_emb (B, D), text_enc (B, L, W), text_mask (B, L) -> tokens (B, P, M), mask (B, P).

        keep: (B,) bool; False takes the caption away: its tokens are masked out and a learned
        vector stands in for the text embedding. None keeps all. Nothing else is ever dropped:
        the branch without a caption still sees the noised image embedding.
        """
        if keep is not None:
            text_emb = torch.where(keep[:, None], text_emb, self.null_text_emb.to(text_emb.dtype))
            text_mask = text_mask & keep[:, None]
        # Unit-norm inputs have tiny entries, 1 / sqrt(D); times sqrt(D) they are of size 1.
        text_emb = text_emb * math.sqrt(text_emb.shape[-1])
        tokens = torch.cat([self.text_enc_in(text_enc), self.text_emb_in(text_emb)[:, None]], dim=1)
        always = torch.ones_like(text_mask[:, :1])  # the text embedding's token is always there
        # Captions may be padded to less than CLIP's L; the text embedding keeps the last position.
        position = torch.cat([self.position[: text_enc.shape[1]], self.position[-1:]])
        return tokens + position, torch.cat([text_mask, always], dim=1)


# --- the diffusion prior ---------------------------------------------------------------------


class DiffusionPrior(nn.Module):
    """Causal transformer that predicts the clean image embedding (paper sec. 2.2, table 3)."""

    # Guidance in drawing from captions, if not told otherwise. Paper: how much is not stated. We:
    # 4, chosen on shapes. Because: unguided, an embedding now and then binds a colour to the other
    # object's shape, above all in pairs that no training picture showed. README has what that
    # costs in variety.
    usual_scale = 4.0

    def __init__(self, config):
        super().__init__()
        self.config = config
        M = config.width
        self.prefix = CaptionPrefix(config)
        self.time = nn.Sequential(nn.Linear(M, M), nn.SiLU(), nn.Linear(M, M))
        self.noised_in = nn.Linear(config.dim, M)
        self.query = nn.Parameter(0.02 * torch.randn(M))
        self.position = nn.Parameter(0.02 * torch.randn(3, M))
        self.blocks = nn.ModuleList(Block(M, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(M)
        self.out = nn.Linear(M, config.dim)
        # No clipping: an embedding's dimensions, unlike pixels, have no hard limits.
        self.diffusion = GaussianDiffusion(
            T=config.diffusion_steps, schedule="cosine", predict=config.predict,
            variance=config.variance, clip_x_0=False,
        )

    def suffix(self, x_t, t):
        """x_t (B, D) noised scaled embeddings, t (B,) -> the three tokens (B, 3, M)."""
        time = self.time(timestep_embedding(t, self.config.width).to(x_t.dtype))
        tokens = torch.stack([time, self.noised_in(x_t), self.query.expand_as(time)], dim=1)
        return tokens + self.position

    def read_out(self, x):
        """The output at the final query, (..., M), -> the predicted embedding, (..., D)."""
        return self.out(self.norm(x))

    def forward(self, x_t, t, text_emb, text_enc, text_mask, keep=None):
        """The whole sequence at once, K suffixes sharing one prefix (K = 1: the paper's picture).

        x_t: (B * K, D), t: (B * K,); the caption's tensors have B rows. Returns (B * K, D).
        Row b * K + k is copy k of example b. A copy sees the prefix and, causally, itself; it
        never sees another copy, so each is computed as if it were alone.
        """
        tokens, key_mask = self.prefix(text_emb, text_enc, text_mask, keep)
        B, P, M = tokens.shape
        K = x_t.shape[0] // B
        x = torch.cat([tokens, self.suffix(x_t, t).view(B, 3 * K, M)], dim=1)  # (B, P + 3K, M)

        key_mask = torch.cat([key_mask, key_mask.new_ones(B, 3 * K)], dim=1)
        # Which group each token is in: 0 for the prefix, 1..K for the copies.
        copies = torch.arange(1, K + 1, device=x.device).repeat_interleave(3)
        group = F.pad(copies, (P, 0))
        same_group = (group[:, None] == group) | (group == 0)  # (N, N): rows look at columns
        x, _ = run_blocks(self.blocks, x, causal_mask(key_mask) & same_group)
        return self.read_out(x[:, P + 2 :: 3]).reshape(B * K, -1)

    def loss(self, batch):
        """Mean-squared error of the predicted embedding (paper sec. 2.2, the equation of L_prior).

        batch: image_emb (B, D) unit norm, text_emb (B, D) unit norm, text_enc (B, L, W),
        text_mask (B, L) bool. Returns a scalar.
        """
        x_0 = batch["image_emb"] * embedding_scale(self.config.dim)  # a new tensor: never in place
        keep = torch.rand(len(x_0), device=x_0.device) >= self.config.drop_text

        def network(x_t, t):
            text = batch["text_emb"], batch["text_enc"], batch["text_mask"]
            return self(x_t, t, *text, keep=keep)

        return self.diffusion.training_loss(
            network, x_0.repeat_interleave(self.config.copies, 0)
        ).mean()

    @torch.no_grad()
    def finish(self, batch):
        """Once, after training: measure what the analytic variance needs on a batch of data."""
        if self.config.variance == "analytic":
            text = self.encode_caption(batch["text_emb"], batch["text_enc"], batch["text_mask"])
            network = functools.partial(self.cached_network, **text)
            x_0 = batch["image_emb"] * embedding_scale(self.config.dim)
            self.diffusion.estimate_variance(network, x_0)

    def encode_caption(self, text_emb, text_enc, text_mask, keep=None):
        """Run the prefix once: its keys and values, and which of its tokens are real."""
        tokens, key_mask = self.prefix(text_emb, text_enc, text_mask, keep)
        _, cache = run_blocks(self.blocks, tokens, causal_mask(key_mask))
        return {"cache": cache, "key_mask": key_mask}

    def cached_network(self, x_t, t, cache, key_mask):
        """One denoising step given the prefix's keys and values: three tokens in, (B, D) out."""
        see_prefix = key_mask[:, None].expand(-1, 3, -1)  # (B, 3, P)
        see_self = (
            torch.ones(3, 3, dtype=torch.bool, device=x_t.device).tril().expand(len(x_t), 3, 3)
        )
        mask = torch.cat([see_prefix, see_self], dim=2)
        x, _ = run_blocks(self.blocks, self.suffix(x_t, t), mask, cache)
        return self.read_out(x[:, -1])

    @torch.no_grad()
    def sample(self, text_emb, text_enc, text_mask, scale=1.0, steps=None, generators=None,
               candidates=2, on_step=None):
        """Draw image embeddings for captions.

        text_emb (B, D) unit norm, text_enc (B, L, W), text_mask (B, L): from the frozen CLIP.
        scale: guidance, uncond + scale * (cond - uncond); off at 1.
        steps: of the T diffusion steps (default: the config's 64). generators: one an example.
        candidates: embeddings drawn for each caption; the one with the largest dot product with
        text_emb is kept (paper sec. 2.2: two).
        Returns image_emb (B, D), unit norm.
        """
        B, D = text_emb.shape
        keep = torch.zeros(B, dtype=torch.bool, device=text_emb.device)
        cond = self.encode_caption(text_emb, text_enc, text_mask)
        uncond = cond if scale == 1 else self.encode_caption(text_emb, text_enc, text_mask, keep)
        cond, uncond = (
            {k: v.repeat_interleave(candidates, 0) for k, v in c.items()} for c in (cond, uncond)
        )
        # An example's candidates take turns at its own generator, so the batch plays no part.
        if generators is not None:
            generators = [g for g in generators for _ in range(candidates)]
        x_0 = self.diffusion.sample(
            guided(self.cached_network, cond, uncond, scale), (B * candidates, D),
            steps=self.config.sample_steps if steps is None else steps,
            generators=generators, on_step=on_step,
        )
        image_emb = F.normalize(x_0.float(), dim=-1).view(B, candidates, D)
        return rerank(image_emb, text_emb)


def rerank(image_emb, text_emb):
    """Keep, for each caption, the candidate closest to it: (B, candidates, D), (B, D) -> (B, D)."""
    # A sum, not a matrix product: autocast would round that to bfloat16, and ties would decide.
    best = (image_emb.float() * text_emb.float()[:, None]).sum(dim=-1).argmax(dim=1)
    return image_emb[torch.arange(len(best), device=best.device), best]
