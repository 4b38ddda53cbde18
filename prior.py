"""The diffusion prior: from a caption to a CLIP image embedding, P(z_i | y)  (paper sec. 2.2).

Many pictures fit one caption, so the decoder has to be told which one to draw. CLIP's text
embedding cannot say that: it is the same for all of them, and it lies in another part of the sphere
than image embeddings do. The prior draws one of the image embeddings that fit. It is a diffusion
model whose "pixels" are the D numbers of an embedding, and its network is a transformer over

    [caption tokens, L] [text embedding] | [timestep] [noised image embedding] [query]
    <-------- prefix: P = L + 1 -------->   <----------- suffix: 3 tokens ----------->

Why causal, and why in this order? The paper gives no reason, but together they make sampling cheap:
a token sees only what comes before it, so the prefix cannot depend on the timestep or on the noise.
Its keys and values are computed once per caption, and each of the 64 denoising steps runs three
tokens instead of P + 3. The answer is read at the query, which is last because only the last token
sees everything.

Why predict the embedding and not the noise? The paper found it better (sec. 2.2). A likely reason:
embeddings lie near a few directions, noise fills all D, and to predict noise the network must carry
all of x_t through; lab/findings.py measures the difference (F7).

Letters: B batch, D CLIP embedding, L caption tokens, W width of CLIP's token features, M width of
this transformer, P prefix length, K noised copies of an embedding.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import GaussianDiffusion, SeededNoise, guided
from networks import Block, CaptionPrefix, causal_mask, run_blocks, timestep_embedding


def embedding_scale(dim):
    """Unit embeddings are multiplied by 17.2 at 1024 dimensions (paper app. C): each dimension then
    has a standard deviation of 0.54, like pixels, for which the schedules were made."""
    return 17.2 * math.sqrt(dim / 1024)


@dataclass(frozen=True)
class PriorConfig:
    dim: int  # D, size of CLIP's embeddings
    text_width: int  # W, width of CLIP's token features
    text_len: int  # L, CLIP's context length
    width: int = 256  # M. Paper: 2048, with 24 blocks of 32 heads
    depth: int = 4
    heads: int = 4
    predict: str = "x_0"  # "noise" and "v" are there to compare with (F7)
    variance: str = "analytic"  # of sampling, as in the paper (table 3); or "fixed_small"
    copies: int = 4  # K noised copies that share a caption's prefix in training
    drop_text: float = 0.1  # share of examples trained without their caption, for guidance
    diffusion_steps: int = 1000  # T
    sample_steps: int = 64


class DiffusionPrior(nn.Module):
    """A causal transformer that predicts the clean image embedding (paper sec. 2.2, table 3)."""

    # Default guidance when drawing; 1 is off. The paper does not say how much it guides its prior,
    # and found that guidance hurt aesthetics (sec. 5.5). On shapes, 4 gets more of the pairs of
    # colour and shape right that training left out, for a little less variety (lab/README.md).
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
        # Pixels end at -1 and 1, embeddings have no such limits: x_0 is not clipped.
        self.diffusion = GaussianDiffusion(
            config.diffusion_steps, "cosine", config.predict, config.variance, clip_x_0=False)

    def encode_caption(self, text_emb, text_enc, text_mask, keep=None):
        """Run the prefix: its keys and values, and which of its tokens are real."""
        tokens, key_mask = self.prefix(text_emb, text_enc, text_mask, keep)
        _, cache = run_blocks(self.blocks, tokens, causal_mask(key_mask))
        return {"cache": cache, "key_mask": key_mask}

    def forward(self, x_t, t, cache, key_mask):
        """Predict the clean embeddings behind x_t (B * K, D) at noise levels t (B * K,).

        cache, key_mask: encode_caption of B captions. Row b * K + k is copy k of example b: in
        training K copies share a prefix, in sampling K = 1. No copy sees another.
        """
        B, K = len(key_mask), len(x_t) // len(key_mask)
        time = self.time(timestep_embedding(t, self.config.width).to(x_t.dtype))
        suffix = torch.stack([time, self.noised_in(x_t), self.query.expand_as(time)], dim=1)
        suffix = (suffix + self.position).view(B, 3 * K, -1)
        # A copy's three tokens are causal among themselves: K triangles on the diagonal.
        triangle, each = torch.ones(3, 3, device=x_t.device).tril(), torch.eye(K, device=x_t.device)
        own = torch.kron(each, triangle).bool().expand(B, -1, -1)
        mask = torch.cat([key_mask[:, None].expand(-1, 3 * K, -1), own], dim=2)  # (B, 3K, P + 3K)
        x, _ = run_blocks(self.blocks, suffix, mask, past=cache)
        return self.out(self.norm(x[:, 2::3])).reshape(B * K, -1)  # read at each copy's query

    # --- training ---

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        """No pixels: image_emb and text_emb (B, D), text_enc (B, L, W), text_mask (B, L)."""
        return embeddings.batch(indices, rng)

    def loss(self, batch, t=None):
        """Mean squared error of the predicted embedding (paper sec. 2.2), a scalar. t (B,): the
        examples' noise levels; by default one is drawn for each copy."""
        x_0 = batch["image_emb"] * embedding_scale(self.config.dim)  # a new tensor: never in place
        keep = torch.rand(len(x_0), device=x_0.device) >= self.config.drop_text
        cond = self.encode_caption(batch["text_emb"], batch["text_enc"], batch["text_mask"], keep)
        x_0, t = (x if x is None else x.repeat_interleave(self.config.copies, 0) for x in (x_0, t))
        return self.diffusion.training_loss(functools.partial(self, **cond), x_0, t).mean()

    @torch.no_grad()
    def finish(self, batch):
        """After training: measure the analytic variance on a batch."""
        if self.config.variance == "analytic":
            cond = self.encode_caption(batch["text_emb"], batch["text_enc"], batch["text_mask"])
            x_0 = batch["image_emb"] * embedding_scale(self.config.dim)
            self.diffusion.estimate_variance(functools.partial(self, **cond), x_0)

    def preview(self, batches):
        """What to look at in training: a drawn embedding's cosines with the true one, the caption's
        and another picture's. (figures, no pictures, no captions)"""
        batch, _ = batches.look()
        text_emb, true = batch["text_emb"], batch["image_emb"]
        drawn = self.sample(text_emb, batch["text_enc"], batch["text_mask"],
                            noise=SeededNoise(range(len(true))))
        others = {"cos_true": true, "cos_text": text_emb, "cos_unrelated": true.roll(1, 0)}
        return {k: (drawn * x).sum(dim=1).mean().item() for k, x in others.items()}, None, None

    # --- sampling ---

    @torch.no_grad()
    def sample(self, text_emb, text_enc, text_mask, scale=1.0, steps=None, noise=None,
               candidates=2, on_step=None):
        """Draw an image embedding (B, D) of unit norm for each of B captions, as CLIP encodes them.

        scale: guidance, off at 1. steps: by default the config's. candidates: as in the paper, two
        are drawn for each caption, and the one closer to the text embedding is kept.
        """
        B, D = text_emb.shape
        cond = uncond = self.encode_caption(text_emb, text_enc, text_mask)
        if scale != 1:
            keep = torch.zeros(B, dtype=torch.bool, device=text_emb.device)
            uncond = self.encode_caption(text_emb, text_enc, text_mask, keep)
        cond, uncond = ({k: v.repeat_interleave(candidates, 0) for k, v in c.items()}
                        for c in (cond, uncond))
        x_0 = self.diffusion.sample(
            guided(self, cond, uncond, scale), (B * candidates, D), noise=noise, on_step=on_step,
            steps=steps or self.config.sample_steps)
        return rerank(F.normalize(x_0.float(), dim=-1).view(B, candidates, D), text_emb)


def rerank(image_emb, text_emb):
    """The closest to text_emb (B, D) of each caption's candidates (B, candidates, D): (B, D)."""
    # A sum, as autocast would round a matrix product to bfloat16, and ties would decide.
    best = (image_emb.float() * text_emb.float()[:, None]).sum(dim=-1).argmax(dim=1)
    return image_emb[torch.arange(len(best), device=best.device), best]
