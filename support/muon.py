"""Muon: the optimizer of the matrices inside most of our networks (Jordan et al. 2024).

Adam scales each number of a gradient by itself. But a layer's weights are a matrix, and its
gradient points mostly along the few directions that the layer already uses, so rare directions,
which may tell one shape from another, are learned late. Muon steps equally far in all directions:
from the momentum's singular value decomposition U S V^T it keeps U V^T.

The one idea: U V^T needs no decomposition. The polynomial a x + b x x^T x + c (x x^T)^2 x acts on
the singular values of x alone, and with the right a, b, c five rounds bring all of them near 1.

The paper uses Adam for everything (table 3). With Muon for the stacks of layers a network gets
further in the same time (`python -m lab.bench --race "" muon=None`). torch.optim.Muon takes no
convolutions and always computes in bfloat16, which is slow on most CPUs.
"""

import torch
from torch import nn

# Table 3 has a beta2 and an eps for each stage; one setting serves here.
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 1e-2}
MOMENTUM = 0.95
# Jordan's: steep at 0, so that small values catch up fast. All end between 0.7 and 1.2, not at 1.
A, B, C, ROUNDS = 3.4445, -4.7750, 2.0315, 5


def orthogonalise(matrices):
    """(..., rows, columns) -> approximately U V^T of each matrix U S V^T, by Newton-Schulz."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # x x^T is then the smaller of the two squares
    # The Frobenius norm brings all singular values to 1 or below. Zero stays zero.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if torch.is_autocast_enabled(x.device.type):  # bfloat16 turns a step by only a few degrees
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum. A convolution (out, in, h, w) is a matrix (out, in * h * w)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # shape -> [(parameter, update)]: one batched call a shape is faster
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                update = p.grad.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov: looks ahead
                alike.setdefault(update.shape, []).append((p, update))
            for (rows, columns), pairs in alike.items():
                length = group["lr"] * max(1, rows / columns) ** 0.5  # one lr for all shapes
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.add_(update.view_as(p), alpha=-length)


def make_optimizers(model, muon=None):
    """[AdamW for all], or with `muon`, [AdamW, Muon for the matrices inside stacks of layers].

    muon: its learning rate as a multiple of Adam's, which the loop reads from a group's "scale".
    First and last layers, embeddings, norms and biases stay with Adam: each of their rows means
    something by itself, such as a colour channel or a word. Norms, biases and embeddings do not
    decay: nothing is gained by pulling a scale or a word towards 0.
    """
    # open_clip's ResNet keeps its blocks in nn.Sequential.
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)
              or isinstance(m, nn.Sequential) and any(next(c.children(), None) for c in m)]
    inside = {p for stack in stacks for p in stack.parameters() if p.dim() > 1} if muon else set()
    matrices = [p for p in model.parameters() if p in inside]  # in the model's order, for resuming
    others = [(name, p) for name, p in model.named_parameters() if p not in inside]
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {True: [], False: []}  # whether they decay
    for name, p in others:
        exempt = p.dim() < 2 or p in tables or "embedding" in name or "position" in name
        groups[not exempt].append(p)
    adam = torch.optim.AdamW([{"params": groups[True], "scale": 1.0},
                              {"params": groups[False], "scale": 1.0, "weight_decay": 0.0}],
                             fused=True, **ADAM)
    return [adam, Muon([{"params": matrices, "scale": muon}], lr=0.0)] if matrices else [adam]
