"""Muon for the hidden matrices and convolutions of small models (Jordan et al. 2024, "Muon: an optimizer for
hidden layers in neural networks"). torch.optim.Muon takes matrices only; the codecs here are convolutions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shared.training_parallel import like, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that drives all singular values to about 1 in five rounds
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal; a kernel [out, in, ...] is a matrix [out, in * ...].

    Updates are scaled to the root mean square that AdamW's typically have (0.2 sqrt(larger side)), so that
    learning rates carry over from AdamW. A sharded matrix is gathered, and every process makes all of it
    orthogonal and keeps its shard: the momentum stays sharded, the update is that of one process to the bit.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        params = list(params)
        if flat := [tuple(p.shape) for p in params if p.ndim < 2]:
            raise ValueError(f"Muon is for matrices and kernels, got parameters of shape {flat[:3]}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                nesterov = whole(p.grad.lerp(momentum, group["momentum"]))
                update = orthogonal(nesterov.flatten(1))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                alpha = -group["lr"] * 0.2 * max(update.shape) ** 0.5
                p.add_(like(update.view(p.shape), p), alpha=alpha)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, approximately (singular values 0.7 to 1.2), by Newton-Schulz rounds."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
