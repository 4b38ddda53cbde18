"""The autoregressive prior: an image embedding, spelt as a sentence of codes (paper sec. 2.2).

The paper has two priors. The diffusion prior (prior.py) is the one it keeps; this is the other, a
language model. It first turns the continuous embedding into discrete codes:

    image_emb (D) -> PCA: C components -> each into one of `buckets` -> C codes

and then predicts code after code, each given the caption and the codes before it:

    [caption tokens] [text embedding] [dot product] | [code 1] [code 2] ... -> the next code

Why the largest component first? The first codes then decide the most about the embedding, while
the caption is all that is known, and later codes only refine what stands already. The dot-product
token says how well picture and caption fit, image_emb . text_emb, in buckets too: in training it is
known, and in sampling one asks for a good fit by drawing it from the top half.

Sampling costs C evaluations of one token each, thanks to the same cache of keys and values as in
the diffusion prior. Letters: B batch, D CLIP embedding, C principal components and codes, L caption
tokens, W width of CLIP's token features, M width of this transformer, P prefix length, N data.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from networks import Block, causal_mask, run_blocks
from prior import CaptionPrefix, cosines


@dataclass(frozen=True)
class AutoregressivePriorConfig:
    dim: int  # D, size of CLIP's embeddings
    text_width: int  # W, width of CLIP's token features
    text_len: int  # L, CLIP's context length
    components: int  # C, principal components kept: see fewest_components. Paper: 319 of 1024
    buckets: int = 128  # values that each component may take. Paper: 1024
    dot_buckets: int = 16  # values of the dot-product token. Paper: not stated
    width: int = 192  # M. Paper: 1664, 24 blocks, 26 heads, and a text transformer of its own
    depth: int = 4
    heads: int = 4
    drop_text: float = 0.1  # share of examples trained without their caption


def principal_components(image_emb):
    """PCA of embeddings (N, D): mean (D,), basis (D, D), variances (D,), in float64.

    basis' rows are the orthonormal directions in which the data varies most, the largest first;
    variances are the eigenvalues of the covariance, in the same order.
    """
    image_emb = image_emb.double()
    mean = image_emb.mean(dim=0)
    centred = image_emb - mean
    variances, basis = torch.linalg.eigh(centred.T @ centred / len(image_emb))  # ascending
    return mean, basis.T.flip(0), variances.flip(0).clamp(min=0)


def fewest_components(variances, error=0.01):
    """How many principal components leave less than `error` of the variance out (paper sec. 2.2).

    Leaving components out costs a squared error of exactly the sum of their eigenvalues.
    """
    left_out = 1 - variances.cumsum(0) / variances.sum()
    return int((left_out >= error).sum()) + 1


class AutoregressivePrior(nn.Module):
    """Predicts an image embedding code by code (paper sec. 2.2, table 3).

    `fit` finds the components and buckets of the training data, once, before anything else.
    """

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
        self.dot_in = nn.Embedding(config.dot_buckets + 1, M)  # the last: no caption, no fit
        self.code_in = nn.Embedding(config.buckets, M)
        self.position = nn.Parameter(0.02 * torch.randn(C, M))
        self.blocks = nn.ModuleList(Block(M, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(M)
        self.out = nn.Linear(M, config.buckets)

    @classmethod
    def fresh(cls, fields, data, clip, embeddings):
        """A prior fitted to training embeddings (at most 100,000 of them), before any training."""
        some = range(min(len(embeddings), 100_000))
        image_emb, text_emb = embeddings.pairs(some, np.random.default_rng(0))
        _, _, variances = principal_components(image_emb)
        prior = cls(AutoregressivePriorConfig(components=fewest_components(variances), **fields))
        prior.fit(image_emb, text_emb)
        rounded = prior.dequantise(prior.quantise(image_emb))
        kept, C = prior.reconstruct(prior.project(image_emb)), prior.config.components
        total = variances.sum().item()
        left_out, rounding = ((a - b).square().sum(1).mean().item() / total
                              for a, b in ((image_emb, kept), (kept, rounded)))
        print(f"ar_prior: {C} of {prior.config.dim} principal components leave out {left_out:.2%} "
              f"of the variance; {prior.config.buckets} buckets each cost another {rounding:.2%}")
        return prior

    # --- embeddings as codes, and back ---

    @torch.no_grad()
    def fit(self, image_emb, text_emb):
        """Find components and buckets of training data: (N, D) and a caption each, (N, D).

        The paper does not state the buckets' edges. Here each bucket holds equally many training
        embeddings, so that every code occurs equally often and none is spent on rare tails.
        """
        mean, basis, _ = principal_components(image_emb)
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        components = self.project(image_emb).T.contiguous()  # (C, N)
        self.edges.copy_(equal_mass_edges(components, self.config.buckets))
        codes = torch.searchsorted(self.edges, components)
        # A bucket stands for the mean of what is in it, which has the least squared error; an empty
        # one (in data with ties) for its edge.
        mean, count = bucket_means(components, codes, self.config.buckets)
        edge = torch.cat([self.edges, self.edges[:, -1:]], dim=1)
        self.values.copy_(torch.where(count > 0, mean, edge))
        dots = (image_emb * text_emb).sum(dim=1)
        self.dot_edges.copy_(equal_mass_edges(dots[None], self.config.dot_buckets)[0])

    def project(self, image_emb):
        """Image embeddings (B, D) -> their first C principal components (B, C), in float32."""
        with torch.autocast(image_emb.device.type, enabled=False):  # bf16 would miss the bucket
            return (image_emb.float() - self.mean) @ self.basis[: self.config.components].T

    def reconstruct(self, components):
        """The first C principal components of embeddings, any C up to D -> embeddings (B, D)."""
        return self.mean + components @ self.basis[: components.shape[1]]

    def quantise(self, image_emb):
        """(B, D) -> codes (B, C): integers in [0, buckets)."""
        return torch.searchsorted(self.edges, self.project(image_emb).T.contiguous()).T

    def dequantise(self, codes):
        """codes (B, C) -> image embeddings (B, D), of about unit norm."""
        return self.reconstruct(self.values.gather(1, codes.T).T)

    # --- training ---

    def first_tokens(self, text_emb, text_enc, text_mask, dot, keep):
        """The prefix with its dot-product token: tokens (B, P + 1, M), mask (B, P + 1)."""
        tokens, key_mask = self.prefix(text_emb, text_enc, text_mask, keep)
        # How well it fits the caption is about the caption, and is dropped with it.
        dot = torch.where(keep, dot, self.config.dot_buckets)
        tokens = torch.cat([tokens, (self.dot_in(dot) + self.position[0])[:, None]], dim=1)
        return tokens, F.pad(key_mask, (0, 1), value=True)

    def forward(self, codes, text_emb, text_enc, text_mask, dot, keep):
        """Logits of every code given those before it: (B, C, buckets).

        codes (B, C); dot (B,) buckets of the dot product; keep (B,) bool: False, no caption.
        """
        tokens, key_mask = self.first_tokens(text_emb, text_enc, text_mask, dot, keep)
        P = tokens.shape[1]
        later = self.code_in(codes[:, :-1]) + self.position[1:]
        key_mask = F.pad(key_mask, (0, later.shape[1]), value=True)
        x, _ = run_blocks(self.blocks, torch.cat([tokens, later], dim=1), causal_mask(key_mask))
        return self.out(self.norm(x[:, P - 1:]))

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        """As the diffusion prior's: image_emb, text_emb, text_enc, text_mask."""
        return embeddings.batch(indices, rng)

    def loss(self, batch, t=None):
        """Cross-entropy of the codes, nats a code. (t is the diffusion stages': not used here.)"""
        image_emb, text_emb = batch["image_emb"], batch["text_emb"]
        codes = self.quantise(image_emb)
        dot = torch.searchsorted(self.dot_edges, (image_emb * text_emb).sum(dim=1))
        keep = torch.rand(len(dot), device=dot.device) >= self.config.drop_text
        logits = self(codes, text_emb, batch["text_enc"], batch["text_mask"], dot, keep)
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())

    def preview(self, batches):
        return cosines(self, batches)

    # --- sampling ---

    @torch.no_grad()
    def sample(self, text_emb, text_enc, text_mask, scale=1.0, noise=None):
        """Draw an image embedding (B, D) of unit norm for each of B captions, code by code.

        text_emb (B, D), text_enc (B, L, W), text_mask (B, L): from the frozen CLIP.
        scale: guidance of the logits, uncond + scale * (cond - uncond); off at 1.
        noise: a SeededNoise, or None.
        """
        B, device = len(text_emb), text_emb.device
        # One uniform number a decision, drawn in advance.
        shape = (B, 1 + self.config.components)
        uniform = (noise(shape, torch.rand) if noise else torch.rand(shape)).to(device)
        # Ask for a good fit: a bucket from the top half of the dot products (paper sec. 2.2). The
        # buckets have equal mass, so the top half of the buckets is the top half of the pictures.
        n = self.config.dot_buckets
        dot = (n // 2 + (uniform[:, 0] * (n - n // 2)).long()).clamp(max=n - 1)

        yes = torch.ones(B, dtype=torch.bool, device=device)
        branches = [yes] if scale == 1 else [yes, ~yes]  # with guidance: 2B rows
        parts = [self.first_tokens(text_emb, text_enc, text_mask, dot, keep) for keep in branches]
        x, key_mask = (torch.cat(part) for part in zip(*parts, strict=True))
        past, mask, codes = None, causal_mask(key_mask), []
        for i in range(self.config.components):
            x, own = run_blocks(self.blocks, x, mask, past)
            past = own if past is None else torch.cat([past, own], dim=4)
            logits = self.out(self.norm(x[:, -1])).float()
            if scale != 1:
                cond, uncond = logits.chunk(2)
                logits = uncond + scale * (cond - uncond)
            # The code at which the cumulative probability passes the uniform number.
            passed = logits.softmax(dim=-1).cumsum(dim=-1) < uniform[:, i + 1, None]
            code = passed.sum(dim=-1).clamp(max=self.config.buckets - 1)
            codes.append(code)
            if i + 1 < self.config.components:
                x = self.code_in(code.repeat(len(branches)))[:, None] + self.position[i + 1]
                key_mask = F.pad(key_mask, (0, 1), value=True)
                mask = key_mask[:, None]  # the one new token sees every real token and itself
        return F.normalize(self.dequantise(torch.stack(codes, dim=1)), dim=-1)


def equal_mass_edges(values, buckets):
    """Edges (C, buckets - 1) between buckets that hold equally many of values (C, N)."""
    N = values.shape[1]
    at = torch.arange(1, buckets) * N // buckets  # how many values lie below each edge
    ascending = values.sort(dim=1).values
    # The clamp: with fewer values than buckets, the first edges have none below them.
    return (ascending[:, (at - 1).clamp(min=0)] + ascending[:, at]) / 2


def bucket_means(values, codes, buckets):
    """The mean of values (C, N) in each bucket, 0 where it is empty, and how many values are in it,
    both (C, buckets). codes (C, N): their bucket numbers."""
    zeros = torch.zeros(len(values), buckets, dtype=values.dtype, device=values.device)
    count = zeros.scatter_add(1, codes, torch.ones_like(values))
    return zeros.scatter_add(1, codes, values) / count.clamp(min=1), count
