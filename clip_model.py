"""The frozen CLIP: pictures and captions as points on one sphere (CLIP, 2103.00020; paper sec. 2).

CLIP is two networks, one for pictures and one for captions, trained so that a picture is nearer to
its own caption than to others. (All captions still lie apart from all pictures: see prior.py.) Here
it is one of open_clip's pretrained models, or a small one trained on the same data as everything
else. The other stages never train it further. Through `FrozenClip` they get the same four things
from any CLIP:

    image_emb  (B, D)     unit norm: the picture's point on the sphere
    text_emb   (B, D)     unit norm: the caption's point
    text_enc   (B, L, W)  features of each caption token, after the text tower's last norm
    text_mask  (B, L)     True up to and including the end-of-text token

Letters: B batch, K different captions in it, D embedding, L context length, W text width.
"""

import functools
import math
import re
import zlib
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import nn
from tqdm import tqdm

from diffusion import at_least_float32
from support.captions import LATER
from support.openclip import open_pretrained, weights_hash
from support.tokenizer import Tokenizer, make_vocab

# --- a small CLIP, trained here --------------------------------------------------------------


@dataclass(frozen=True)
class SmallClipConfig:
    vocab: tuple  # BPE ids seen in training, ascending
    dim: int = 128  # D
    image_size: int = 64  # pixels
    vision_layers: tuple = (1, 1, 1, 1)  # bottleneck blocks of the four stages of CLIP's ResNet
    vision_width: int = 32
    text_width: int = 128  # W
    text_layers: int = 3
    text_heads: int = 4
    context_length: int = 32  # L, tokens: our captions are short


@functools.lru_cache
def tokenizer_of(config):
    return Tokenizer(config.context_length, config.vocab)


class SmallClip(nn.Module):
    """open_clip's CLIP at a size for a laptop: a narrow ResNet and a text transformer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        vision = open_clip.CLIPVisionCfg(config.vision_layers, config.vision_width, head_width=32,
                                         image_size=config.image_size)
        text = open_clip.CLIPTextCfg(
            context_length=config.context_length, vocab_size=tokenizer_of(config).vocab_size,
            width=config.text_width, heads=config.text_heads, layers=config.text_layers)
        self.model = open_clip.CLIP(config.dim, vision, text)
        self.model.visual.to(memory_format=torch.channels_last)  # faster convolutions, as in UNet

    @classmethod
    def fresh(cls, fields, data, clip=None, embeddings=None):
        """A new model whose vocabulary is the words of `data`'s captions."""
        numbers = tqdm(range(len(data)), "captions", **LATER)
        vocab = make_vocab(c for i in numbers for c in data.captions(i))
        return cls(SmallClipConfig(vocab, **fields))

    @staticmethod
    def batch(config, data, embeddings, indices, rng):
        """Pictures `indices`, each with one of its captions: image (B, 3, H, W); tokens (K, L) of
        the K different captions; which (B,), the row of each picture's caption; number (B,), equal
        for equal captions, also in the batches of other processes."""
        # One draw for all: if "a photo of a cat" and "a blurry photo of a cat" met in a batch, each
        # would count as a wrong answer to the other's pictures.
        turn = rng.random()
        captions = [c[int(turn * len(c))] for c in map(data.captions, indices)]
        images = [varied(data, i, config.image_size, c, rng) for i, c in zip(indices, captions)]
        numbers = [zlib.crc32(c.encode()) for c in captions]
        _, first, which = np.unique(numbers, return_index=True, return_inverse=True)
        return {"image": torch.stack(images), "which": torch.from_numpy(which),
                "tokens": tokenizer_of(config)([captions[k] for k in first]),
                "number": torch.tensor(numbers)}

    def embed(self, batch):
        """The batch's image_emb and text_emb (B, D), of unit norm, and CLIP's scale."""
        # open_clip's forward normalises, and returns the scale already exponentiated: another exp
        # would start it at exp(14). Its encode_image and encode_text do *not* normalise.
        image_emb, text_emb, scale = self.model(batch["image"], batch["tokens"])
        return at_least_float32(image_emb), at_least_float32(text_emb)[batch["which"]], scale

    def loss(self, batch, t=None):
        """The contrastive loss of a batch, a scalar. (There is no noise level t here.)"""
        self.model.logit_scale.data.clamp_(max=math.log(100))  # see clip_loss
        image_emb, text_emb, scale = self.embed(batch)
        numbers = batch["number"]
        if self.training and dist.is_initialized():
            # All processes' rows together: among fewer, the right caption is easier to find.
            image_emb, text_emb = gather_features(image_emb, text_emb, gather_with_grad=True)
            everyone = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, numbers)
            numbers = torch.cat(everyone)
        # Not in bfloat16, whose 8 significant bits leave logits near 100 off by up to 0.25.
        with torch.autocast(image_emb.device.type, enabled=False):
            return clip_loss(image_emb, text_emb, scale, numbers)

    @torch.no_grad()
    def preview(self, batches):
        """How often it picks the right one of 16 captions for a picture. Chance is 0.06, and more
        where captions are equal, which are all right."""
        batch, _ = batches.look()
        image_emb, text_emb, _ = self.embed(batch)
        chosen, numbers = (image_emb @ text_emb.T).argmax(dim=1), batch["number"]
        match = (numbers[chosen] == numbers).float().mean().item()
        return {"match_of_16": match}, None, None


def varied(data, i, size, caption, rng):
    """Picture i as another photo of the same thing: a window of 3/4 of its side or more, mirrored
    half the time. If the caption tells left from right it is not mirrored, and a drawing stays as
    it is."""
    if not data.photographs:
        return data.image(i, size)
    whole = int(rng.integers(size, size * 4 // 3 + 1))
    top, left = map(int, rng.integers(0, whole - size + 1, 2))
    # A photo is cut to a square: anywhere in training, in the centre for FrozenClip.
    image = data.image(i, whole, (top, left, size), place=rng.random())
    mirrored = rng.random() < 0.5 and not re.search(r"\b(left|right)\b", caption)
    return image.flip(-1) if mirrored else image


def clip_loss(image_emb, text_emb, scale, number=None):
    """Symmetric contrastive loss (CLIP fig. 3): which caption goes with which picture, and back.

    image_emb, text_emb: (B, D) unit norm; row i of one belongs to row i of the other.
    number: (B,), equal where captions are. Such rows are not each other's negatives: among 256
    captions of a data set with few different ones many are equal, and all of those are right.
    scale: the inverse temperature of the softmax. Cosines end at 1: unscaled, a perfect match
    among 256 captions would have a probability of only e / (e + 255) = 1%. CLIP learns the scale,
    starting at 1 / 0.07 = 14, and clamps it at 100 to keep training stable (CLIP sec. 2.5).
    """
    logits = scale * image_emb @ text_emb.T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    number = target if number is None else number
    same = (number[:, None] == number) & (target[:, None] != target)
    logits = logits.masked_fill(same, -math.inf)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --- the frozen interface --------------------------------------------------------------------


class FrozenClip(nn.Module):
    """One interface to every CLIP. Never trained, always in eval mode."""

    def __init__(self, model, tokenizer, name):
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        # How this model wants its pictures: open_clip keeps mean, std, size, interpolation here.
        settings = getattr(model.visual, "preprocess_cfg", {})
        size = settings.get("size", model.visual.image_size)
        self.image_size = size if isinstance(size, int) else size[0]
        bilinear = settings.get("interpolation") == "bilinear"
        self.interpolation = "bilinear" if bilinear else "bicubic"  # open_clip's default
        for key in ("mean", "std"):
            value = torch.tensor(settings.get(key, (0.5, 0.5, 0.5))).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)
        # Sizes, measured on a first caption of zeros.
        text_emb, text_enc, _ = self.encode_ids(torch.zeros(1, tokenizer.context_length).long())
        self.dim, self.text_len, self.text_width = text_emb.shape[1], *text_enc.shape[1:]
        self.identity = f"{name}:{weights_hash(model)}"  # the key of caches and checkpoints

    def train(self, mode=True):
        return super().train(False)  # whatever the model around it does

    @torch.no_grad()
    def encode_image(self, images):
        """images (B, 3, H, W) in [-1, 1], any size -> image_emb (B, D), unit norm."""
        images, size = (images + 1) / 2, (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode=self.interpolation, antialias=True)
            images = images.clamp(0, 1)  # bicubic resizing overshoots at edges
        return F.normalize(self.model.encode_image((images - self.mean) / self.std).float(), dim=-1)

    def encode_text(self, captions):
        """B captions -> text_emb (B, D) unit norm, text_enc (B, L, W), text_mask (B, L) bool."""
        return self.encode_ids(self.tokenizer(captions).to(self.mean.device))

    @torch.no_grad()
    def encode_ids(self, ids):
        """The same from token ids (B, L)."""
        # open_clip returns the pooled embedding alone. The features of all tokens pass through
        # ln_final on the way to it, where a hook reads them.
        seen = []
        tower = self.model if hasattr(self.model, "ln_final") else self.model.text
        with tower.ln_final.register_forward_hook(lambda module, args, out: seen.append(out)):
            text_emb = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        # text_emb comes from the end-of-text token and the tower is causal, so the features behind
        # that token were never trained: they are junk, and the mask ends before them.
        end = ids.argmax(dim=1, keepdim=True)  # end of text has the largest id
        text_mask = torch.arange(ids.shape[1], device=ids.device) <= end
        return text_emb, seen[0].float(), text_mask


def freeze_small_clip(small):
    """SmallClip -> FrozenClip."""
    return FrozenClip(small.model, tokenizer_of(small.config), "small")


def load_open_clip(spec):
    """MODEL:TAG_OR_FILE, or MODEL:TAG=FILE -> FrozenClip (see support/openclip.py)."""
    return FrozenClip(*open_pretrained(spec))
