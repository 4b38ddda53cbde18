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

from diffusion import GaussianDiffusion, guided, timestep_embedding

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


# --- the autoregressive prior ----------------------------------------------------------------


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
