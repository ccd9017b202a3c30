"""A small stack of 3D convolutions: with weights from a fixed seed, or from a safetensors file.

Random convolutions tell textures, colours and motions apart well enough to rank models on one data set. The
numbers compare with nothing outside of this benchmark.
Legend: B batch, C channels, T frames, H/W rows/columns, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.metrics.base import RefusedError
from shared.checkpoints import load_tensors
from shared.errors import WeightsError
from shared.video import Video

SEED = 2022
CHANNELS = (3, 16, 32, 64)
KERNEL = 3
SIDE, FRAMES = 64, 16  # what a video is brought to


class ConvolutionStack:
    """Convolutions with ReLU, each halving rows and columns, from the second on also the frames; a video's
    features are the means over time and space of the last layer and, behind them, its standard deviations."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """`layers` holds weights [C_out, C_in, t, h, w] and biases [C_out]."""
        self.layers = layers

    @staticmethod
    def from_seed(seed: int = SEED) -> ConvolutionStack:
        """Weights drawn by NumPy's PCG64, which stays the same from version to version."""
        rng = np.random.Generator(np.random.PCG64(seed))
        layers = []
        for c_in, c_out in pairwise(CHANNELS):
            fan_in = c_in * KERNEL**3
            weight = rng.standard_normal((c_out, c_in, KERNEL, KERNEL, KERNEL)) * (2 / fan_in) ** 0.5
            bias = rng.standard_normal(c_out) * 0.1
            layers.append((torch.from_numpy(weight).float(), torch.from_numpy(bias).float()))
        return ConvolutionStack(layers)

    @staticmethod
    def from_file(path: Path) -> ConvolutionStack:
        """`layers.N.weight` and `layers.N.bias` of a safetensors file; WeightsError for anything else."""
        try:
            return ConvolutionStack(_layers(load_tensors(path)))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} holds no stack of 3D convolutions: {error}") from error

    @torch.no_grad()
    def features(self, x_BCTHW: Tensor) -> Tensor:
        """Pixels in -1..1 -> float64 [B, 2 C]."""
        for number, (weight, bias) in enumerate(self.layers):
            stride = (1 if number == 0 else 2, 2, 2)
            padding = tuple(side // 2 for side in weight.shape[2:])
            x_BCTHW = F.relu(F.conv3d(x_BCTHW, weight, bias, stride=stride, padding=padding))
        flat = x_BCTHW.flatten(2).double()
        return torch.cat([flat.mean(2), flat.std(2, correction=0)], dim=1)


def _layers(tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    count = len(tensors) // 2
    wanted = {f"layers.{i}.{part}" for i in range(count) for part in ("weight", "bias")}
    if not count or wanted != set(tensors):
        raise ValueError(f"wanted layers.N.weight and layers.N.bias, got {sorted(tensors)[:4]}")
    layers = [
        (tensors[f"layers.{i}.weight"].float(), tensors[f"layers.{i}.bias"].float()) for i in range(count)
    ]
    channels = 3
    for weight, bias in layers:
        if weight.ndim != 5 or weight.shape[1] != channels or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"weight {list(weight.shape)}, bias {list(bias.shape)} behind {channels} channels"
            )
        channels = len(bias)
    return layers


def stack_input(video: Video) -> Tensor:
    """[1, 3, 16, 64, 64] in -1..1: frames evenly spaced over the video, squashed by averaging areas.

    RefusedError under four frames."""
    if video.num_frames < 4:
        raise RefusedError(f"the feature net needs four frames or more, got {video.num_frames}")
    picks = torch.linspace(0, video.num_frames - 1, FRAMES, dtype=torch.float64).round().long()
    frames_TCHW = video.frames[picks].permute(0, 3, 1, 2).float()
    small = F.interpolate(frames_TCHW, size=(SIDE, SIDE), mode="area")
    return (small / 127.5 - 1).transpose(0, 1)[None]  # [T, C, H, W] -> [1, C, T, H, W]
