"""Shared by the stages' tests: random captions, and networks in which every weight matters."""

import torch
import torch.nn.functional as F
from torch import nn

D, W, L, T = 16, 12, 8, 50  # CLIP embedding, token features, context length; noise levels


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def captions(lengths):
    """text_emb (B, D), text_enc (B, L, W), text_mask (B, L) of captions of these lengths."""
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return unit(len(lengths), D), torch.randn(len(lengths), L, W), mask


def batch_of(lengths, **more):
    """What a prior is trained on, for captions of these lengths; a decoder also needs `image`."""
    text = dict(zip(("text_emb", "text_enc", "text_mask"), captions(lengths)))
    return {"image_emb": unit(len(lengths), D), **text, **more}


def pictures(B, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(B, 3, size, size, generator=generator) - 1


def randomise(model, std=0.7):
    """Fresh U-Nets answer zero; give every weight a value, so that the answer depends on them."""
    for p in model.parameters():
        nn.init.normal_(p, std=std / max(1, p[0].numel()) ** 0.5)
    return model.eval()


def amplify(model, *names):
    """Fresh positions and null vectors are small: make the parameters so named count."""
    for name, p in model.named_parameters():
        if any(n in name for n in names):
            nn.init.normal_(p)
    return model.eval()


def differs(a, b, least=1e-4):
    """Every example of one is another in the other."""
    return (a - b).flatten(1).abs().amax(1).min() > least


class FakeBatches:
    """In place of train.Batches, for model.preview: always the same batch and captions."""

    def __init__(self, batch, captions=None):
        self.look = lambda: (batch, captions)
