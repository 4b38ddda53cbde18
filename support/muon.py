"""Muon: the optimizer of most matrices of the base decoder and upsamplers (Jordan et al. 2024).

Adam scales each number of a gradient by itself. A layer's weights are a matrix, though, and its
gradient is mostly a few directions, those that the layer uses already: Adam follows them, and the
rare directions, in which a shape differs from another, wait for long. Muon gives every direction
of the step the same length. Of the momentum's singular value decomposition U S V^T it keeps U V^T.

The one idea: U V^T needs no decomposition. The polynomial a s + b s^3 + c s^5 of a matrix acts on
its singular values s alone, and with the right a, b, c five rounds of it bring all of them near 1.

Paper (table 3): Adam for everything. We: Muon within the stacks of layers, Adam for the rest.
Because: the decoder gets to a loss in half of the time (`tests/bench.py --race optimizers`).
torch.optim.Muon is the same rule, but it always computes in bfloat16, which is many times slower
than float32 on a processor without it, and it takes no convolutions.
Read next: train.py.
"""

import torch
from torch import nn

# Paper: table 3's Adam settings, for batches of thousands. We: one setting. Because: small batches.
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1e-2}
MOMENTUM = 0.95
# Chosen by Jordan to rise steeply at 0, so that small singular values catch up in few rounds. The
# price: they end within 0.7 .. 1.2, not at 1, which training does not notice.
A, B, C, ROUNDS = 3.4445, -4.7750, 2.0315, 5


def orthogonalise(matrices):
    """(..., rows, columns) -> U V^T, nearly, of each one's singular value decomposition U S V^T.

    Newton-Schulz iteration: x becomes (a + b x x^T + c (x x^T)^2) x.
    The singular values must begin below 1.2: divided by the Frobenius norm, the root of the sum of
    their squares, none is above 1. Zero stays zero. Under autocast it computes in bfloat16, which
    is accurate enough: rounding turns the step by a few degrees.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller of the two squares
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. A convolution (out, in, h, w) is a matrix (out, in * h * w).

    No weight decay, and no per-number scaling as in Adam: lr alone sets how long a step is.
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # shape -> [(parameter, its update)]: one call for all of a shape is faster
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                update = p.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov: a step ahead
                alike.setdefault(update.shape, []).append((p, update))
            for (rows, columns), pairs in alike.items():
                # A tall matrix's step is longer, by sqrt(rows / columns): one lr for all shapes.
                length = group["lr"] * max(1, rows / columns) ** 0.5
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update.view_as(p), alpha=-length)


def make_optimizers(model, muon=None):
    """[AdamW for all], or with `muon`, [AdamW, Muon for the matrices inside stacks of layers].

    muon: Muon's learning rate as a multiple of Adam's; each group's "scale" tells the loop. The
    first and the last layer, embeddings, norms and biases stay with Adam: a row of those is
    something by itself (a channel of the picture, a word), not a direction among equals.
    """
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    inside = {p for stack in stacks for p in stack.parameters() if p.dim() > 1} if muon else set()
    matrices = [p for p in model.parameters() if p in inside]  # in the model's order, for resuming
    others = [p for p in model.parameters() if p not in inside]
    optimizers = [torch.optim.AdamW([{"params": others, "scale": 1.0}], fused=True, **ADAM)]
    if matrices:
        optimizers.append(Muon([{"params": matrices, "scale": muon}], lr=0.0))
    return optimizers
