"""The video every stage hands on: frames and their rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Video:
    """Frames uint8 [T, H, W, 3] in RGB, and frames per second."""

    frames: Tensor
    fps: float

    def __post_init__(self) -> None:
        shape = tuple(self.frames.shape)
        if self.frames.dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], got {self.frames.dtype} {list(shape)}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")

    @property
    def num_frames(self) -> int:
        return self.frames.shape[0]

    @property
    def height(self) -> int:
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        return self.frames.shape[2]

    @property
    def seconds(self) -> float:
        """Time from the first frame's start to the last frame's end."""
        return self.num_frames / self.fps

    def to_pixels(self) -> Tensor:
        """float32 [3, T, H, W] in -1..1, the range and order that the codecs read."""
        return self.frames.permute(3, 0, 1, 2).float() / 127.5 - 1  # [T, H, W, C] -> [C, T, H, W]

    @staticmethod
    def from_pixels(pixels_CTHW: Tensor, fps: float) -> Video:
        """Inverse of `to_pixels`: float [3, T, H, W] in -1..1, clamped and rounded to uint8."""
        frames = ((pixels_CTHW.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Video(
            frames=frames.permute(1, 2, 3, 0).contiguous().cpu(), fps=fps
        )  # [C, T, H, W] -> [T, H, W, C]

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write to mp4, gif, mkv (lossless) or a folder of png; see `shared.video_io.write_video`."""
        from shared.video_io import write_video

        return write_video(self, path, **options)
