"""Muon for weights of any rank, one batch of matrix products for all weights of a shape (torch's own takes matrices, one by one).

The step is the momentum with its singular values pulled to 1 by a Newton-Schulz iteration (Jordan et al. 2024), scaled so that
AdamW's learning rates fit (root mean square 0.2). A convolution kernel counts as a matrix [out, in * taps].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonal(g: Tensor) -> Tensor:
    """``[n, r, c]`` with the singular values of each matrix pulled to about 1; bf16 on a GPU."""
    wide = g.shape[1] <= g.shape[2]
    x = g if wide else g.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide else x.transpose(1, 2)).float()


class Muon:
    """Momentum 0.95 (Nesterov) and orthogonal steps; same calls as a torch optimiser: ``step``, ``zero_grad``."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        self.param_groups = [{"lr": lr}]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            self.shapes[p.shape[0], p[0].numel()].append(p)
        self.buffers: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for shape, group in self.shapes.items():
            g = torch.stack([p.grad.reshape(shape) for p in group])
            buffer = self.buffers.setdefault(shape, torch.zeros_like(g))
            buffer.lerp_(g, 1 - self.momentum)
            update = orthogonal(g.lerp(buffer, self.momentum)) * (0.2 * max(shape) ** 0.5 * lr)
            for p, u in zip(group, update, strict=True):
                p.mul_(1 - lr * self.weight_decay).sub_(u.view_as(p))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.shapes.values():
            for p in group:
                p.grad = None
