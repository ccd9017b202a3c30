"""Parts of training losses that do not depend on the family."""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = 6.0  # extra weight of pixels at outlines, the few that decide which shape is seen


def edge_weight(pixels: Tensor, edge: float = EDGE) -> Tensor:
    """Weight 1..1+edge of every pixel [B, C, ..., H, W] in -1..1, [B, 1, ..., H, W]: largest where
    neighbouring pixels of one frame differ."""
    gray = pixels.mean(1, keepdim=True)
    down = torch.nn.functional.pad((gray[..., 1:, :] - gray[..., :-1, :]).abs(), (0, 0, 0, 1))
    right = torch.nn.functional.pad((gray[..., :, 1:] - gray[..., :, :-1]).abs(), (0, 1, 0, 0))
    return 1 + edge * (down + right).clamp(max=1)
