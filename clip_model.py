"""The frozen CLIP: pictures and captions as points on one sphere (CLIP, 2103.00020; paper sec. 2).

Everything in this repository is written in CLIP's terms, and CLIP itself is never trained along.
Two kinds of CLIP stand behind one interface, `FrozenClip`:

    pretrained  any open_clip model and tag, or a local weights file, with its own preprocessing
    small       open_clip's own CLIP class, some 40 times smaller than ViT-B-32, trained here

The one idea of this file: what leaves it is always the same four things, whatever the CLIP:

    image_emb  (B, D)     unit norm: the picture's point on the sphere
    text_emb   (B, D)     unit norm: the caption's point
    text_enc   (B, L, W)  CLIP's features of each caption token, after the text tower's last norm
    text_mask  (B, L)     True up to and including the end-of-text token

CLIP's text tower is causal and was trained through the end-of-text token alone, so the features
behind that token are junk: whoever reads text_enc must read text_mask too.

Letters: B batch, D embedding, L context length, W text width.
Read next: diffusion.py; how embeddings are computed once and kept is at the end of this file.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from diffusion import at_least_float32
from support.openclip import open_pretrained
from support.tokenizer import Tokenizer

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
    context_length: int = 32  # L. Paper: 256. We: 32. Because: our captions are short.


class SmallClip(nn.Module):
    """open_clip's CLIP at a size for a laptop: a narrow ResNet and a text transformer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        vision = open_clip.CLIPVisionCfg(
            layers=config.vision_layers, width=config.vision_width, head_width=32,
            image_size=config.image_size,
        )
        text = open_clip.CLIPTextCfg(
            context_length=config.context_length, vocab_size=len(config.vocab) + 2,
            width=config.text_width, heads=config.text_heads, layers=config.text_layers,
        )
        self.model = open_clip.CLIP(config.dim, vision, text)

    def loss(self, batch):
        """batch: image (B, 3, H, W) in [-1, 1] at CLIP's size, tokens (B, L). Returns a scalar.

        Over several processes everybody's rows are gathered first, so that to find the right
        caption is as hard as on one machine.
        """
        # open_clip's scale has been exponentiated already.
        image_emb, text_emb, scale = self.model(batch["image"], batch["tokens"])
        # Validation is one process's business: the others would not answer.
        if self.training and dist.is_initialized():
            image_emb, text_emb = all_rows(image_emb), all_rows(text_emb)
        return clip_loss(image_emb, text_emb, scale)

    def clamp(self):
        """Call after each step: CLIP keeps its temperature from running away (CLIP sec. 2.5)."""
        self.model.logit_scale.data.clamp_(max=np.log(100))


def all_rows(mine):
    """Everybody's rows (W B, D), of which mine (B, D) alone carry a gradient, W times.

    All W processes have the same loss, and each knows how its own rows move it. The gradients of
    the weights are averaged over the processes, where they should be added up: so times W.
    """
    W = dist.get_world_size()
    rows = [torch.empty_like(mine) for _ in range(W)]
    dist.all_gather(rows, mine.detach().contiguous())
    rows[dist.get_rank()] = mine.detach() + W * (mine - mine.detach())
    return torch.cat(rows)


def clip_loss(image_emb, text_emb, scale):
    """Symmetric contrastive loss (CLIP fig. 3): which caption goes with which picture, and back.

    image_emb, text_emb: (B, D) unit norm, row i of one belongs to row i of the other.
    scale: the inverse temperature itself, not its logarithm.
    """
    # Not in bfloat16: with 8 bits, a scale of 100 would leave logits right to about half a unit.
    with torch.autocast(image_emb.device.type, enabled=False):
        logits = scale * at_least_float32(image_emb) @ at_least_float32(text_emb).T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --- the frozen interface --------------------------------------------------------------------


class FrozenClip(nn.Module):
    """One interface over every CLIP. Never trained, always in eval mode.

    dim D, text_width W, text_len L, image_size: sizes. identity: a string that is different for
    different weights; caches and checkpoints are keyed by it.
    """

    def __init__(self, model, tokenizer, name):
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        # Where open_clip keeps how this model wants its pictures: mean, std, size, interpolation.
        settings = model.visual.preprocess_cfg if hasattr(model.visual, "preprocess_cfg") else {}
        size = settings.get("size", model.visual.image_size)
        self.image_size = size if isinstance(size, int) else size[0]
        # Whatever is not bilinear is bicubic, as in open_clip.
        bilinear = settings.get("interpolation") == "bilinear"
        self.interpolation = "bilinear" if bilinear else "bicubic"
        for key in ("mean", "std"):
            value = torch.tensor(settings.get(key, (0.5, 0.5, 0.5))).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)
        ids = torch.zeros(1, tokenizer.context_length, dtype=torch.long)
        text_emb, text_enc, _ = self.encode_ids(ids)
        self.dim, self.text_len, self.text_width = text_emb.shape[1], *text_enc.shape[1:]
        self.identity = f"{name}:{weights_hash(model)}"

    def train(self, mode=True):
        """Frozen is frozen: stays in eval mode whatever the code around it does."""
        return super().train(False)

    @torch.no_grad()
    def encode_image(self, images):
        """images (B, 3, H, W) in [-1, 1], any size -> image_emb (B, D), unit norm."""
        images = (images + 1) / 2
        if images.shape[-1] != self.image_size or images.shape[-2] != self.image_size:
            images = F.interpolate(
                images, (self.image_size, self.image_size), mode=self.interpolation, antialias=True
            ).clamp(0, 1)
        return F.normalize(self.model.encode_image((images - self.mean) / self.std).float(), dim=-1)

    def encode_text(self, captions):
        """B captions -> text_emb (B, D) unit norm, text_enc (B, L, W), text_mask (B, L) bool."""
        return self.encode_ids(self.tokenizer(captions).to(self.mean.device))

    @torch.no_grad()
    def encode_ids(self, ids):
        """The same from token ids (B, L)."""
        # The features of every token pass through ln_final on their way to the pooled embedding;
        # a hook reads them there, in both of open_clip's layouts of a text tower.
        seen = []
        tower = self.model if hasattr(self.model, "ln_final") else self.model.text
        hook = tower.ln_final.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            text_emb = F.normalize(self.model.encode_text(ids).float(), dim=-1)
        finally:
            hook.remove()
        # End of text has the largest id, so argmax finds it.
        end = ids.argmax(dim=1, keepdim=True)
        text_mask = torch.arange(ids.shape[1], device=ids.device) <= end
        return text_emb, seen[0].float(), text_mask


def weights_hash(model):
    """Short hash of all weights: two CLIPs with the same one are the same CLIP.

    Of the weights rounded to half precision, so that a copy stored in half is still itself.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def freeze_small_clip(small):
    """A trained SmallClip behind the frozen interface."""
    config = small.config
    return FrozenClip(small.model, Tokenizer(config.context_length, config.vocab), "small")


def load_open_clip(spec):
    """MODEL:TAG_OR_FILE, or MODEL:TAG=FILE -> FrozenClip (see support/openclip.py)."""
    return FrozenClip(*open_pretrained(spec))
