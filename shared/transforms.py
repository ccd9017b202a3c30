"""Frames to other sizes and ranges. Legend: T frames (or a batch), C channels, H/W rows/columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.video import Video


def resize(x_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Stretch to exactly [T, C, height, width]: antialiased bicubic; uint8 is rounded and stays uint8."""
    if x_TCHW.shape[-2:] == (height, width):
        return x_TCHW
    result = F.interpolate(
        x_TCHW.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return _like(result, x_TCHW)


def cover_size(height: int, width: int, min_height: int, min_width: int) -> tuple[int, int]:
    """The size of the same aspect (to a pixel, rounded down) that just covers [min_height, min_width]."""
    if width * min_height > min_width * height:  # wider than wanted: the height decides
        return min_height, int(width * min_height / height)
    return int(height * min_width / width), min_width


def centre_crop(x_TCHW: Tensor, height: int, width: int) -> Tensor:
    """The middle [T, C, height, width]; of an odd rest the smaller half is above and to the left."""
    have_height, have_width = x_TCHW.shape[-2:]
    if have_height < height or have_width < width:
        raise ValueError(f"cannot crop {height}x{width} out of {have_height}x{have_width}")
    top, left = (have_height - height) // 2, (have_width - width) // 2
    return x_TCHW[..., top : top + height, left : left + width]


def resize_crop(x_TCHW: Tensor, height: int, width: int) -> Tensor:
    """Cover [height, width] and cut out the middle, undistorted: as CogVideoX's training data (SAT) does."""
    covering = cover_size(x_TCHW.shape[-2], x_TCHW.shape[-1], height, width)
    return centre_crop(resize(x_TCHW, *covering), height, width)


def fit_video(video: Video, height: int, width: int) -> Video:
    """`resize_crop` of a video."""
    frames = resize_crop(video.frames.permute(0, 3, 1, 2), height, width)  # [T, H, W, C] -> [T, C, H, W]
    return Video(frames=frames.permute(0, 2, 3, 1).contiguous(), fps=video.fps)  # -> [T, H, W, C]


def to_signed(x: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return x.float() / 127.5 - 1


def _like(result: Tensor, given: Tensor) -> Tensor:
    return (
        result.clamp(0, 255).round().to(torch.uint8) if given.dtype == torch.uint8 else result.to(given.dtype)
    )
