"""The decoder: from a CLIP image embedding (and the caption) to a 64x64 picture (paper sec. 2.1).

A diffusion model like GLIDE. Its U-Net removes noise from a picture, and is told in two ways what
the picture should show:

    image_emb -+-> linear ------------------------> + timestep embedding -> every residual block
               +-> linear -> 4 tokens --+
    caption ---> text transformer ------+-> context -> every attention layer

Why two? The timestep embedding scales and shifts every residual block at every resolution, but the
same for all pixels: it cannot say *where*. The context lets each pixel pick by attention what
concerns it, but only at the resolutions that attend. Why four tokens and not one? The paper does
not say; attention can tell four keys apart, so each may carry another part of the embedding. In a
short race of small decoders (F11 in lab/README.md) the timestep alone did as well as both. Why the
caption too? The paper hoped that it tells what CLIP misses, such as which colour belongs to which
object, and found that it "offers little help" (sec. 2.1; F2 and F8 in lab/FINDINGS.md).

The one idea: the embedding fixes *what* is in the picture (its semantics), the noise decides
everything that the embedding leaves open. In training the embedding is dropped 10% of the time and
the caption 50%, so one network draws with both, either, or neither, and guidance can amplify the
difference that they make.

Letters: B batch, C channels, H, W picture sides, D CLIP embedding, L caption tokens, E timestep
embedding, X context width, T noise levels.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import GaussianDiffusion, SeededNoise, guided
from networks import Block, TimeEmbedding, UNet, evaluating, run_blocks


@dataclass(frozen=True)
class DecoderConfig:
    dim: int  # D, size of CLIP's embeddings
    text_width: int  # width of CLIP's token features
    text_len: int  # L, CLIP's context length
    vocab_size: int | None = None  # of GLIDE, which reads the words; None: CLIP's token features
    size: int = 64  # side of the pictures, pixels
    channels: int = 32  # Paper: 512, with 3 blocks a level: 3.5B parameters
    multiples: tuple = (1, 2, 3, 4)
    blocks: int = 1
    attention_levels: tuple = (2, 3)  # 16x16 and 8x8. Paper: 32, 16 and 8
    head_channels: int = 32  # Paper: 64
    context_width: int = 128  # X
    text_depth: int = 2  # blocks of the text transformer. Paper: 24
    dropout: float = 0.0  # Paper: 0.1, for 800K iterations
    # What it is trained on. "image_emb": unCLIP's decoder. Two baselines of the paper's sec. 5:
    # "text_emb", CLIP's text embedding in its place; "caption", no embedding at all (GLIDE).
    condition: str = "image_emb"
    drop_image_emb: float = 0.1  # share of examples that see the learned null embedding instead
    drop_caption: float = 0.5  # share of examples trained without their caption
    # GLIDE predicts the noise, with a learned variance. Here x_0, which was ahead of v in two races
    # (lab/README.md); its learned variance's loss would drown everything else at low noise.
    predict: str = "x_0"  # or "noise", "v"
    variance: str = "fixed_small"  # or "fixed_large", "learned"
    weight_cap: float | None = 5.0  # of the loss: see GaussianDiffusion.loss_weight
    diffusion_steps: int = 1000  # T
    sample_steps: int = 32  # Paper: 250. Here seconds, not minutes, on a CPU
    # Only the preset "base", and so weights/shapes, needs these three. The paper has none.
    emb_width: int | None = None  # E; None: 4 * channels, as in ADM
    image_hidden: int | None = None  # width of a hidden layer on the embedding
    stem: int = 1  # fold stem x stem pixels into channels first: see UNet


IMAGE_TOKENS = 4  # context tokens made of the image embedding (paper sec. 2.1)


class Decoder(nn.Module):
    """Diffusion decoder conditioned on a CLIP image embedding and a caption (paper sec. 2.1)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        X, E = config.context_width, config.emb_width or 4 * config.channels
        D, width = config.dim, config.image_hidden or config.dim
        self.time = TimeEmbedding(config.channels, E)
        # Pathway 1: the embedding joins the timestep. Pathway 2: it becomes four context tokens.
        self.null_image_emb = nn.Parameter(torch.randn(D) / math.sqrt(D))
        self.image_in = nn.Identity()
        if config.image_hidden:
            self.image_in = nn.Sequential(nn.Linear(D, width), nn.SiLU())
        self.image_to_time = nn.Linear(width, E)
        self.image_to_tokens = nn.Linear(width, IMAGE_TOKENS * X)
        # The caption. The paper's text transformer, like GLIDE's, starts from the words, and its
        # last token joins the timestep embedding. Ours starts from CLIP's token features, as our
        # data is small; only the baseline that is to be GLIDE, without any CLIP, reads the words.
        self.text_in = (nn.Embedding(config.vocab_size, X) if config.vocab_size
                        else nn.Linear(config.text_width, X))
        self.text_position = nn.Parameter(0.02 * torch.randn(config.text_len, X))
        self.text_blocks = nn.ModuleList(Block(X, heads=X // 32) for _ in range(config.text_depth))
        self.text_norm = nn.LayerNorm(X)
        self.null_caption = nn.Parameter(torch.zeros(E))
        self.text_to_time = nn.Linear(X, E)

        out_channels = 6 if config.variance == "learned" else 3
        self.unet = UNet(
            3, out_channels, config.channels, config.multiples, config.blocks, E,
            config.attention_levels, config.head_channels, X, config.dropout, config.stem,
        ).to(memory_format=torch.channels_last)
        self.diffusion = GaussianDiffusion(
            config.diffusion_steps, "cosine", config.predict, config.variance,
            weight_cap=config.weight_cap)

    def embedding_of(self, batch):
        """The embedding (B, D) of a batch that this decoder is trained to see, or None."""
        return None if self.config.condition == "caption" else batch[self.config.condition]

    def text_of(self, batch):
        """What it is told of a batch's captions: features (B, L, W) or ids (B, L); mask (B, L)."""
        return batch["text_ids" if self.config.vocab_size else "text_enc"], batch["text_mask"]

    def encode_caption(self, text_enc, text_mask):
        """text_enc (B, L, W), or ids (B, L) for GLIDE; text_mask (B, L) -> context tokens (B, L, X)
        and the last one (B, X)."""
        x = self.text_in(text_enc) + self.text_position[: text_enc.shape[1]]
        # Not causal, as the whole caption is known. Padding is never looked at, and the first token
        # is always real: every token has something to look at.
        x, _ = run_blocks(self.text_blocks, x, text_mask[:, None].expand(-1, x.shape[1], -1))
        x, end_of_text = self.text_norm(x), text_mask.sum(dim=1) - 1
        return x, x[torch.arange(len(x), device=x.device), end_of_text]

    def condition(self, image_emb, text_enc, text_mask, keep_image_emb, keep_caption):
        """All that the U-Net is told about a picture, the same at every timestep.

        image_emb (B, D) unit norm; text_enc (B, L, W); text_mask (B, L) bool; keep_* (B,) bool.
        Returns cond_emb (B, E), context (B, 4 + L, X), context_mask (B, 4 + L).
        """
        keep_image_emb, keep_caption = keep_image_emb[:, None], keep_caption[:, None]
        emb = torch.where(keep_image_emb, image_emb, self.null_image_emb.to(image_emb.dtype))
        emb = self.image_in(emb * math.sqrt(emb.shape[-1]))  # unit norm -> entries of size 1
        image_tokens = self.image_to_tokens(emb).unflatten(1, (IMAGE_TOKENS, -1))

        tokens, last = self.encode_caption(text_enc, text_mask)
        last = torch.where(keep_caption, self.text_to_time(last), self.null_caption.to(last.dtype))
        return {
            "cond_emb": self.image_to_time(emb) + last,
            "context": torch.cat([image_tokens, tokens], dim=1),
            "context_mask": F.pad(text_mask & keep_caption, (IMAGE_TOKENS, 0), value=True),
        }

    def forward(self, x_t, t, cond_emb, context, context_mask):
        """The U-Net's output for noised pictures x_t (B, 3, H, W) at t (B,): (B, 3 or 6, H, W)."""
        return self.unet(x_t, self.time(t) + cond_emb, context, context_mask)

    # --- training ---

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        """image (B, 3, size, size) in [-1, 1], and what Embeddings.batch() returns."""
        images = torch.stack([data.image(i, config.size) for i in indices])
        return {"image": images} | embeddings.batch(indices, rng)

    def loss(self, batch, t=None):
        """Mean diffusion loss of a batch, a scalar. t (B,): noise levels, by default drawn."""
        image, emb = batch["image"], self.embedding_of(batch)
        drop_emb, drop_caption = self.config.drop_image_emb, self.config.drop_caption
        if emb is None:
            emb, drop_emb = batch["image_emb"], 1.0
        # Two independent coins an example: 5% see a caption but no embedding (paper fig. 8).
        keep_emb, keep_caption = (torch.rand(len(image), device=image.device) >= rate
                                  for rate in (drop_emb, drop_caption))
        cond = self.condition(emb, *self.text_of(batch), keep_emb, keep_caption)
        return self.diffusion.training_loss(functools.partial(self, **cond), image, t).mean()

    def preview(self, batches):
        """(no figures, pictures, captions): drawn from 16 validation captions and their true
        embeddings, always with the same noise."""
        batch, captions = batches.look()
        emb, noise = self.embedding_of(batch), SeededNoise(range(len(captions)))
        drawn = self.sample(emb, *self.text_of(batch), scale=2.0, noise=noise)
        return {}, drawn, captions

    # --- sampling ---

    @torch.no_grad()
    def network(self, image_emb, text_enc, text_mask, scale=1.0):
        """The guided network under these conditions, a function of (x_t, t) for the samplers.

        image_emb (B, D), or None: the caption alone. text_enc (B, L, W) with text_mask (B, L),
        or None: the embedding alone. Not both None: for neither, any embedding at scale 0.
        scale: uncond + scale * (cond - uncond); off at 1.
        """
        B, device = len(text_enc if image_emb is None else image_emb), self.null_image_emb.device
        no = torch.zeros(B, dtype=torch.bool, device=device)
        keep_image_emb, keep_caption = (no if x is None else ~no for x in (image_emb, text_enc))
        if image_emb is None:
            image_emb = self.null_image_emb.expand(B, -1)
        if text_enc is None:  # any tokens: a dropped caption is masked out
            text_enc = torch.zeros(B, self.config.text_len, self.config.text_width, device=device)
            text_mask = torch.ones_like(text_enc[..., 0], dtype=torch.bool)
        cond = self.condition(image_emb, text_enc, text_mask, keep_image_emb, keep_caption)
        uncond = cond if scale == 1 else self.condition(image_emb, text_enc, text_mask, no, no)
        return guided(self, cond, uncond, scale)

    @torch.no_grad()
    @evaluating
    def sample(self, image_emb=None, text_enc=None, text_mask=None, scale=1.0, steps=None, eta=None,
               noise=None, x_T=None, on_step=None):
        """Draw pictures (B, 3, size, size) in [-1, 1]; see network() for the conditions and scale.

        steps: by default the config's. eta: None for ancestral sampling, a number for DDIM (0 is
        deterministic given x_T). noise, x_T (B, 3, size, size), on_step: see diffusion.py.
        """
        sample = self.diffusion.sample
        if eta is not None:
            sample = functools.partial(self.diffusion.ddim_sample, eta=eta)
        B, size = len(text_enc if image_emb is None else image_emb), self.config.size
        return sample(self.network(image_emb, text_enc, text_mask, scale), (B, 3, size, size),
                      steps or self.config.sample_steps, noise=noise, x_T=x_T, on_step=on_step)
