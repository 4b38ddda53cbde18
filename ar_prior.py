"""The autoregressive prior: an image embedding spelt as a sentence of codes (paper sec. 2.2).

This is the paper's other prior, a language model. It turns the embedding into discrete codes:

    image_emb (D) -> PCA: C components -> each into one of `buckets` -> C codes

and predicts code after code, each given the caption and the codes before it:

    [caption tokens] [text embedding] [dot product] | [code 1] [code 2] ... -> the next code

Why the largest component first? The first codes then settle most of the embedding, and the later
ones only refine it. The dot-product token, the bucket of image_emb . text_emb, says how well
picture and caption fit. In training it is known; in sampling we ask for a good fit by drawing it
from the top half. Sampling runs one token for each code: it has a cache, like the other prior.

Letters: B batch, D CLIP embedding, C principal components and codes, L caption tokens, W width of
CLIP's token features, M width of this transformer, P prefix length, N data.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion import SeededNoise
from networks import Block, CaptionPrefix, causal_mask, run_blocks


@dataclass(frozen=True)
class AutoregressivePriorConfig:
    dim: int  # D, size of CLIP's embeddings
    text_width: int  # W, width of CLIP's token features
    text_len: int  # L, CLIP's context length
    components: int  # C, as many as fewest_components says. Paper: 319 of 1024
    buckets: int = 128  # values that each component may take. Paper: 1024
    dot_buckets: int = 16  # values of the dot-product token. Paper: not stated
    width: int = 192  # M. Paper: 1664, 24 blocks, 26 heads, and a text transformer of its own
    depth: int = 4
    heads: int = 4
    drop_text: float = 0.1  # share of examples trained without their caption


def principal_components(image_emb):
    """PCA of embeddings (N, D), in float64: their mean (D,); the orthonormal directions in which
    they vary, the largest first, as rows (D, D); and the variances along them (D,)."""
    mean = image_emb.double().mean(dim=0)
    centred = image_emb - mean
    variances, basis = torch.linalg.eigh(centred.T @ centred / len(image_emb))  # ascending
    return mean, basis.T.flip(0), variances.flip(0).clamp(min=0)


def fewest_components(variances, error=0.01):
    """How many principal components leave out less than `error` of the variance (paper sec. 2.2),
    which is exactly the squared error of leaving components out."""
    return int((1 - variances.cumsum(0) / variances.sum() >= error).sum()) + 1


class AutoregressivePrior(nn.Module):
    """Predicts an image embedding code by code (paper sec. 2.2, table 3)."""

    usual_scale = 1.0  # guidance off: the dot product already asks for a good fit

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, C, M = config.dim, config.components, config.width
        # Measured by `fit` and kept in the checkpoint. All D components: manipulate.py uses them.
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("basis", torch.eye(D))  # a row a component
        self.register_buffer("edges", torch.zeros(C, config.buckets - 1))  # between the buckets
        self.register_buffer("values", torch.zeros(C, config.buckets))  # what each stands for
        self.register_buffer("dot_edges", torch.zeros(config.dot_buckets - 1))

        self.prefix = CaptionPrefix(config)
        self.dot_in = nn.Embedding(config.dot_buckets + 1, M)  # the last: no caption
        self.code_in = nn.Embedding(config.buckets, M)
        self.position = nn.Parameter(0.02 * torch.randn(C, M))
        self.blocks = nn.ModuleList(Block(M, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(M)
        self.out = nn.Linear(M, config.buckets)

    @classmethod
    def fresh(cls, fields, data, clip, embeddings):
        """A new prior, fitted to at most 100,000 of the training embeddings."""
        some = range(min(len(embeddings), 100_000))
        image_emb, text_emb = embeddings.pairs(some, np.random.default_rng(0))
        _, _, variances = principal_components(image_emb)
        prior = cls(AutoregressivePriorConfig(components=fewest_components(variances), **fields))
        prior.fit(image_emb, text_emb)
        error = (prior.dequantise(prior.quantise(image_emb)) - image_emb).square().sum(1).mean()
        print(f"ar_prior: {prior.config.components} of {prior.config.dim} principal components as "
              f"codes lose {error / variances.sum():.2%} of the variance")
        return prior

    # --- embeddings as codes, and back ---

    @torch.no_grad()
    def fit(self, image_emb, text_emb):
        """Find the components and buckets of N pictures and a caption of each, both (N, D).

        The paper does not state the buckets' edges. Here each bucket holds equally many training
        embeddings, so that no code is wasted on rare values.
        """
        mean, basis, _ = principal_components(image_emb)
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        components = self.project(image_emb).T.contiguous()  # (C, N)
        self.edges.copy_(equal_mass_edges(components, self.config.buckets))
        # A bucket stands for the mean of its values, which has the least squared error; an empty
        # one (the data may have ties) for its edge.
        codes, zeros = torch.searchsorted(self.edges, components), torch.zeros_like(self.values)
        count = zeros.scatter_add(1, codes, torch.ones_like(components))
        means = zeros.scatter_add(1, codes, components) / count.clamp(min=1)
        edges = torch.cat([self.edges, self.edges[:, -1:]], dim=1)
        self.values.copy_(torch.where(count > 0, means, edges))
        dots = (image_emb * text_emb).sum(dim=1)
        self.dot_edges.copy_(equal_mass_edges(dots[None], self.config.dot_buckets)[0])

    def project(self, image_emb):
        """Image embeddings (B, D) -> their first C principal components (B, C)."""
        with torch.autocast(image_emb.device.type, enabled=False):  # bf16 would miss the bucket
            return (image_emb.float() - self.mean) @ self.basis[: self.config.components].T

    def reconstruct(self, components):
        """The first C principal components of embeddings, any C up to D -> embeddings (B, D)."""
        return self.mean + components @ self.basis[: components.shape[1]]

    def quantise(self, image_emb):
        """Image embeddings (B, D) -> codes (B, C): integers in [0, buckets)."""
        return torch.searchsorted(self.edges, self.project(image_emb).T.contiguous()).T

    def dequantise(self, codes):
        """codes (B, C) -> image embeddings (B, D), of about unit norm."""
        return self.reconstruct(self.values.gather(1, codes.T).T)

    # --- training ---

    def first_tokens(self, text_emb, text_enc, text_mask, dot, keep):
        """The prefix and the dot-product token: tokens (B, P + 1, M), mask (B, P + 1)."""
        tokens, key_mask = self.prefix(text_emb, text_enc, text_mask, keep)
        # Without a caption there is nothing to fit: the two are dropped together.
        dot = torch.where(keep, dot, self.config.dot_buckets)
        tokens = torch.cat([tokens, (self.dot_in(dot) + self.position[0])[:, None]], dim=1)
        return tokens, F.pad(key_mask, (0, 1), value=True)

    def forward(self, codes, text_emb, text_enc, text_mask, dot, keep):
        """Logits of every code given those before it: (B, C, buckets). codes (B, C); dot (B,): the
        dot product's buckets; keep (B,) bool: False where the caption is dropped."""
        C = self.config.components
        tokens, key_mask = self.first_tokens(text_emb, text_enc, text_mask, dot, keep)
        tokens = torch.cat([tokens, self.code_in(codes[:, :-1]) + self.position[1:]], dim=1)
        key_mask = F.pad(key_mask, (0, C - 1), value=True)
        x, _ = run_blocks(self.blocks, tokens, causal_mask(key_mask))
        return self.out(self.norm(x[:, -C:]))  # the dot product's token predicts the first code

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        return embeddings.batch(indices, rng)  # as for the diffusion prior

    def loss(self, batch, t=None):
        """Cross-entropy of the codes, nats a code. (There is no noise level t here.)"""
        image_emb, text_emb = batch["image_emb"], batch["text_emb"]
        codes = self.quantise(image_emb)
        dot = torch.searchsorted(self.dot_edges, (image_emb * text_emb).sum(dim=1))
        keep = torch.rand(len(dot), device=dot.device) >= self.config.drop_text
        logits = self(codes, text_emb, batch["text_enc"], batch["text_mask"], dot, keep)
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())

    def preview(self, batches):
        """What to look at in training: the cosine of drawn and true embeddings."""
        batch, _ = batches.look()
        drawn = self.sample(batch["text_emb"], batch["text_enc"], batch["text_mask"],
                            noise=SeededNoise(range(len(batch["text_emb"]))))
        return {"cos_true": (drawn * batch["image_emb"]).sum(dim=1).mean().item()}, None, None

    # --- sampling ---

    @torch.no_grad()
    def sample(self, text_emb, text_enc, text_mask, scale=1.0, noise=None):
        """Draw an image embedding (B, D) of unit norm for each of B captions, as CLIP encodes them.

        scale: guidance of the logits, uncond + scale * (cond - uncond); off at 1. noise: a
        SeededNoise, or None.
        """
        # One uniform number for each token to be drawn.
        shape = (len(text_emb), 1 + self.config.components)
        uniform = (noise(shape, torch.rand) if noise else torch.rand(shape)).to(text_emb.device)
        # Ask for a good fit: a bucket from the top half of the dot products (paper sec. 2.2). The
        # buckets have equal mass, so the top half of the buckets is the top half of the pictures.
        n = self.config.dot_buckets
        dot = (n // 2 + (uniform[:, 0] * (n - n // 2)).long()).clamp(max=n - 1)

        yes = torch.ones_like(dot, dtype=torch.bool)
        branches = [yes] if scale == 1 else [yes, ~yes]  # with guidance: 2B rows
        parts = [self.first_tokens(text_emb, text_enc, text_mask, dot, keep) for keep in branches]
        x, key_mask = map(torch.cat, zip(*parts))
        mask, past, codes = causal_mask(key_mask), None, []
        for i in range(self.config.components):
            # Exercise begins.
            if i > 0:
                x = self.code_in(codes[-1].repeat(len(branches)))[:, None] + self.position[i]
                key_mask = F.pad(key_mask, (0, 1), value=True)
                mask = key_mask[:, None]  # the one new token sees every real token and itself
            x, own = run_blocks(self.blocks, x, mask, past)
            past = own if past is None else torch.cat([past, own], dim=4)  # a token more
            # Exercise ends.
            logits = self.out(self.norm(x[:, -1])).float()
            if scale != 1:
                cond, uncond = logits.chunk(2)
                logits = uncond + scale * (cond - uncond)
            # The code at which the cumulative probability passes the uniform number.
            passed = logits.softmax(dim=-1).cumsum(dim=-1) < uniform[:, i + 1, None]
            codes.append(passed.sum(dim=-1).clamp(max=self.config.buckets - 1))
        return F.normalize(self.dequantise(torch.stack(codes, dim=1)), dim=-1)


def equal_mass_edges(values, buckets):
    """Edges (C, buckets - 1) between buckets that hold equally many of values (C, N)."""
    N = values.shape[1]
    at = torch.arange(1, buckets) * N // buckets  # how many values lie below each edge
    ascending = values.sort(dim=1).values
    # The clamp: with fewer values than buckets, the first edges have none below them.
    return (ascending[:, (at - 1).clamp(min=0)] + ascending[:, at]) / 2
