"""What "FVD" means in four code bases: their numbers differ by frames, resizing, weights and covariance.

Facts from the code of each, not from papers; sources stand at the presets.
Legend: T frames, H/W rows/columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.metrics.base import RefusedError
from shared.video import Video

SIDE = 224
MIN_FRAMES = 10  # fewer leave the I3D net nothing to pool over time


@dataclass(frozen=True, kw_only=True)
class FVDPreset:
    """One way to measure FVD.

    `frames` first frames count (0: all). `spatial` "network" leaves resizing and scaling to the TorchScript;
    "crop" brings the shorter side to 224 and cuts out the middle; "squash" ignores the aspect. `keywords` are
    given to the TorchScript; `covariance_ddof` 0 divides by N, 1 by N - 1.
    """

    name: str
    weights: Literal["i3d", "i3d_400"]
    frames: int
    spatial: Literal["network", "crop", "squash"]
    covariance_ddof: int
    published_n: int
    keywords: tuple[tuple[str, bool], ...] = ()

    def arguments(self) -> dict[str, bool]:
        return dict(self.keywords)

    def parameters(self) -> dict[str, Any]:
        """What makes the recipe's hash."""
        return {
            "frames": self.frames or "all",
            "side": SIDE,
            "spatial": self.spatial,
            "interpolation": "the TorchScript's" if self.spatial == "network" else "bilinear, no antialias",
            "range": "uint8" if self.spatial == "network" else "-1..1",
            "covariance_ddof": self.covariance_ddof,
            "keywords": self.arguments(),
            "weights": self.weights,
        }

    @property
    def words(self) -> str:
        frames = f"first {self.frames} frames" if self.frames else "all frames"
        spatial = {
            "network": "uint8, squashed to 224x224 and scaled inside the network",
            "crop": "shorter side to 224 bilinearly, middle 224x224, -1..1",
            "squash": "squashed to 224x224 bilinearly, -1..1",
        }[self.spatial]
        divisor = f"N{' - 1' * self.covariance_ddof}"
        return f"{frames}; {spatial}; I3D logits ({self.weights}); covariance over {divisor}"


def _torchscript(inside: bool) -> tuple[tuple[str, bool], ...]:
    return (("rescale", inside), ("resize", inside), ("return_features", True))


PRESETS = {
    preset.name: preset
    for preset in (
        FVDPreset(  # universome/stylegan-v src/metrics/{frechet_video_distance,metric_utils}.py
            name="stylegan-v/fvd2048_16f",
            weights="i3d",
            frames=16,
            spatial="network",
            covariance_ddof=0,
            published_n=2048,
            keywords=_torchscript(True),
        ),
        FVDPreset(  # JunyaoHu/common_metrics_on_video_quality fvd/styleganv/fvd.py
            name="common_metrics/styleganv",
            weights="i3d",
            frames=0,
            spatial="crop",
            covariance_ddof=1,
            published_n=0,
            keywords=_torchscript(False),
        ),
        FVDPreset(  # wilson1yan/VideoGPT videogpt/fvd/fvd.py; scripts/compute_fvd.py takes 256 videos
            name="videogpt",
            weights="i3d_400",
            frames=16,
            spatial="crop",
            covariance_ddof=1,
            published_n=256,
        ),
        FVDPreset(  # songweige/content-debiased-fvd cdfvd/fvd.py, cdfvd/third_party/i3d/utils.py
            name="cdfvd/i3d",
            weights="i3d_400",
            frames=16,
            spatial="squash",
            covariance_ddof=0,
            published_n=2048,
        ),
    )
}


def network_input(video: Video, preset: FVDPreset, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the network reads, [1, 3, T, H, W]: uint8 as generated, or `dtype` [1, 3, T, 224, 224] in -1..1.

    Raises RefusedError for a video that is too short: upstream leaves such videos out silently."""
    least = max(preset.frames, MIN_FRAMES)
    if video.num_frames < least:
        raise RefusedError(f"{preset.name} needs {least} frames or more, got {video.num_frames}")
    frames = video.frames[: preset.frames or None].permute(0, 3, 1, 2)  # [T, H, W, C] -> [T, C, H, W]
    if preset.spatial == "network":
        return frames.transpose(0, 1)[None]  # -> [1, C, T, H, W]
    resize = crop_to_square if preset.spatial == "crop" else squash
    pixels = (resize(frames.to(dtype) / 255) - 0.5) * 2
    return pixels.transpose(0, 1)[None].contiguous()


def squash(x_TCHW: Tensor) -> Tensor:
    return F.interpolate(x_TCHW, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def crop_to_square(x_TCHW: Tensor) -> Tensor:
    """The shorter side becomes 224, the longer one is rounded up; the middle is kept."""
    height, width = x_TCHW.shape[-2:]
    scale = SIDE / min(height, width)
    size = (SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIDE)
    large = F.interpolate(x_TCHW, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return large[..., top : top + SIDE, left : left + SIDE]
