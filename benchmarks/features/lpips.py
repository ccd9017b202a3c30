"""LPIPS (Zhang et al. 2018) from a file: TorchScript of any kind, or the AlexNet weights as safetensors.

Legend: T frames, C channels, H/W rows/columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.metrics.base import RefusedError
from shared.checkpoints import load_tensors
from shared.errors import WeightsError
from shared.video import Video

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS's own normalisation of -1..1
EPS = 1e-10
# AlexNet's convolutions by their keys in the lpips package: (key, stride, padding, max-pooling before it)
LAYERS = (
    ("net.slice1.0", 4, 2, False),
    ("net.slice2.3", 1, 2, True),
    ("net.slice3.6", 1, 1, True),
    ("net.slice4.8", 1, 1, False),
    ("net.slice5.10", 1, 1, False),
)
MIN_SIDE = 35  # smaller frames vanish in the poolings

Distance = Callable[[Tensor, Tensor], Tensor]  # [T, 3, H, W] twice, in -1..1 -> [T]


def load_lpips(path: Path) -> Callable[[Video, Video], float]:
    """The mean distance of two videos' frames. WeightsError for a file that is neither kind."""
    distance = _from_weights(path) if path.suffix == ".safetensors" else _from_torchscript(path)

    @torch.no_grad()
    def mean_distance(first: Video, second: Video) -> float:
        if min(first.height, first.width) < MIN_SIDE:
            raise RefusedError(f"LPIPS needs frames of {MIN_SIDE} pixels or more")
        pixels = [video.to_pixels().transpose(0, 1) for video in (first, second)]  # [T, C, H, W]
        return float(distance(pixels[0], pixels[1]).double().mean())

    return mean_distance


def _from_torchscript(path: Path) -> Distance:
    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error
    return lambda first, second: module(first, second).reshape(len(first), -1).mean(1)


def _from_weights(path: Path) -> Distance:
    weights = load_tensors(path)
    names = [f"{key}.{part}" for key, *_ in LAYERS for part in ("weight", "bias")]
    names += [f"lin{i}.model.1.weight" for i in range(len(LAYERS))]
    if missing := [name for name in names if name not in weights]:
        raise WeightsError(
            f"{path} lacks {missing[0]} of AlexNet-LPIPS ({len(missing)} of {len(names)} missing)"
        )
    return lambda first, second: alexnet_lpips(first, second, weights)


def alexnet_lpips(first_TCHW: Tensor, second_TCHW: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Distances [T] of frames in -1..1: weighted squared differences of unit features, summed over layers."""
    shift, scale = (torch.tensor(x).view(1, 3, 1, 1) for x in (SHIFT, SCALE))
    pairs = torch.cat([first_TCHW, second_TCHW])
    x, total = (pairs - shift) / scale, torch.zeros(len(first_TCHW))
    for number, (key, stride, padding, pooled) in enumerate(LAYERS):
        x = F.max_pool2d(x, 3, 2) if pooled else x
        x = F.relu(F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], stride, padding))
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + EPS)
        difference = (unit[: len(first_TCHW)] - unit[len(first_TCHW) :]).square()
        total = total + F.conv2d(difference, weights[f"lin{number}.model.1.weight"]).mean((1, 2, 3))
    return total
