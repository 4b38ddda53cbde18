"""The autoregressive prior: an embedding spelt as a sentence of codes (paper sec. 2.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from networks import Block, causal_mask, run_blocks
from prior import CaptionPrefix

@dataclass(frozen=True)
class AutoregressivePriorConfig:
    dim: int  # D, size of CLIP's embeddings
    text_width: int  # W, width of CLIP's token features
    text_len: int  # L, CLIP's context length
    components: int  # C, principal components kept: see fewest_components. Paper: 319 of 1024
    buckets: int = 128  # values that each component may take. Paper: 1024
    dot_buckets: int = 16  # values of the dot-product token. Paper: not stated
    # M. Paper: 1664, 24 blocks, 26 heads, and a text transformer of its own. We: small, on CLIP's
    # token features. Because: one machine, little data.
    width: int = 192
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

    Leaving components out costs a squared error of just their eigenvalues' sum.
    """
    left_out = 1 - variances.cumsum(0) / variances.sum()
    return int((left_out >= error).sum()) + 1


class AutoregressivePrior(nn.Module):
    """Predicts an image embedding as a sentence of discrete codes (paper sec. 2.2, table 3).

        [caption tokens] [text embedding] [dot product] | [code 1] [code 2] ... -> the next code

    An embedding becomes C codes by PCA and quantisation: code i says in which of the buckets its
    i-th principal component lies, the component with the largest variance first. The token before
    them says how well picture and caption fit, image_emb . text_emb, so that sampling can ask for
    a good fit. `fit` has to be called once, with the training data, before anything else.
    """

    usual_scale = 1.0  # 4 binds worse than none here: the dot product already asks for a fit

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, C, M = config.dim, config.components, config.width
        # Measured by `fit` and kept in the checkpoint. All D components: sample.py probe uses them.
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

    # --- embeddings as codes, and back ---

    @torch.no_grad()
    def fit(self, image_emb, text_emb):
        """Find components and buckets of training data: (N, D) and a caption each, (N, D).

        Paper: the buckets' edges are not stated. We: equal mass, each bucket holds as many training
        embeddings. Because: every code then occurs equally often. Equal width gives a smaller
        error, but that of either is small beside what the left-out components cost, and it spends
        most codes on rare tails; quantisation_errors measures both.
        """
        mean, basis, _ = principal_components(image_emb)
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        components = self.project(image_emb).T.contiguous()  # (C, N)
        self.edges.copy_(equal_mass_edges(components, self.config.buckets))
        codes = torch.searchsorted(self.edges, components)
        # A bucket stands for the mean of what is in it: the least squared error. Empty ones (data
        # with ties) stand for their edge.
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

    def loss(self, batch):
        """Cross-entropy of the codes, nats a code. batch: as the diffusion prior's."""
        image_emb, text_emb = batch["image_emb"], batch["text_emb"]
        codes = self.quantise(image_emb)
        dot = torch.searchsorted(self.dot_edges, (image_emb * text_emb).sum(dim=1))
        keep = torch.rand(len(dot), device=dot.device) >= self.config.drop_text
        logits = self(codes, text_emb, batch["text_enc"], batch["text_mask"], dot, keep)
        return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())

    # --- sampling ---

    @torch.no_grad()
    def sample(self, text_emb, text_enc, text_mask, scale=1.0, generators=None):
        """Draw image embeddings for captions: C evaluations: the prefix, then one code each.

        text_emb (B, D), text_enc (B, L, W), text_mask (B, L): from the frozen CLIP.
        scale: guidance of the logits, uncond + scale * (cond - uncond); off at 1.
        generators: one CPU torch.Generator an example. Returns image_emb (B, D), unit norm.
        """
        B, device = len(text_emb), text_emb.device
        # One uniform number a decision, so that an example depends on its own generator alone.
        count = 1 + self.config.components
        if generators is None:
            uniform = torch.rand(B, count)
        else:
            uniform = torch.stack([torch.rand(count, generator=g) for g in generators])
        uniform = uniform.to(device)
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


def equal_width_edges(values, buckets):
    """Edges (C, buckets - 1) between buckets of equal width from each row's least to its most."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    return low + (high - low) * torch.arange(1, buckets) / buckets


def bucket_means(values, codes, buckets):
    """Of values (C, N) with bucket numbers codes (C, N): the mean of each bucket, 0 where it is
    empty, and how many are in it, both (C, buckets)."""
    zeros = torch.zeros(len(values), buckets, dtype=values.dtype, device=values.device)
    count = zeros.scatter_add(1, codes, torch.ones_like(values))
    return zeros.scatter_add(1, codes, values) / count.clamp(min=1), count


def quantisation_errors(components, buckets):
    """Mean squared error of components (C, N) after quantising, over their variance, two ways.

    Returns {"equal mass": ..., "equal width": ...}; every bucket stands for the mean of its values.
    """
    errors = {}
    for name, edges_of in (("equal mass", equal_mass_edges), ("equal width", equal_width_edges)):
        codes = torch.searchsorted(edges_of(components, buckets), components)
        mean, _ = bucket_means(components, codes, buckets)
        error = (components - mean.gather(1, codes)).square().sum()
        spread = (components - components.mean(1, keepdim=True)).square().sum()
        errors[name] = (error / spread).item()
    return errors
