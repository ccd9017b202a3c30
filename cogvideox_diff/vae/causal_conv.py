"""Causal convolution over clips that are run whole or in pieces.

Shapes: B batch, C channels, T frames, H/W rows/columns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.cpu_linear import has_quick_linear, quick_linear


class ClipContext:
    """What a piece of a clip knows about the rest: made once per clip, passed down through every layer.

    Whatever couples frames goes through here (history of a convolution, the single first frame, group norm
    statistics), so running a clip over several processes needs another context and no other net.
    """

    def __init__(self, *, single_frame: str = "first_piece", keep: bool = True) -> None:
        self.single_frame = single_frame  # see VAEConfig.single_frame
        self.keep = keep  # False: no piece will follow, nothing is stored
        self.first_piece = True
        self.histories: dict[nn.Module, Tensor] = {}

    def extend(self, conv: nn.Module, x_BCTHW: Tensor, num_frames: int) -> Tensor:
        """Put the `num_frames` frames before this piece in front; at the clip's start, copies of frame 0."""
        history = self.histories.get(conv)
        if history is None:
            history = x_BCTHW[:, :, :1].expand(-1, -1, num_frames, -1, -1)
        x_BCTHW = torch.cat([history, x_BCTHW], dim=2)
        if self.keep:
            self.histories[conv] = x_BCTHW[:, :, -num_frames:].clone()
        return x_BCTHW

    def has_single_frame(self, num_frames: int) -> bool:
        """Whether the first of these frames stands alone while all others are halved or doubled in time."""
        if self.single_frame == "odd_count":
            return num_frames % 2 == 1
        return self.single_frame == "first_piece" and self.first_piece

    def group_norm(self, norm: nn.GroupNorm, x_BCTHW: Tensor) -> Tensor:
        """Statistics over this piece alone: pieces and whole clips differ, as in the released models."""
        return norm(x_BCTHW)


class Stage(Protocol):
    """Encoder or decoder: a piece [B, C, T, H, W] and its context -> the result's piece."""

    frame_unit: int  # a clip may be cut only between so many frames (after a single first one)

    def __call__(self, x_BCTHW: Tensor, context: ClipContext) -> Tensor: ...


class RunStage(Protocol):
    """How a stage goes through a clip: `run_causal`, or on several processes what equals it."""

    def __call__(self, stage: Stage, x_BCTHW: Tensor, *, chunk: int, single_frame: str) -> Tensor: ...


def chunk_bounds(num_frames: int, chunk: int) -> list[tuple[int, int]]:
    """Cut into `chunk`-sized runs; the remainder rides with the first run (13, 2 -> 0:3, 3:5, ... 11:13).

    `chunk` 0 is one run over everything.
    """
    if chunk == 0 or num_frames < chunk:
        return [(0, num_frames)]
    starts = [0, *range(chunk + num_frames % chunk, num_frames, chunk)]
    return list(zip(starts, [*starts[1:], num_frames], strict=True))


def run_causal(stage: Stage, x_BCTHW: Tensor, *, chunk: int, single_frame: str) -> Tensor:
    """Run `stage` over the pieces of a clip in order, carrying the history from one to the next."""
    bounds = chunk_bounds(x_BCTHW.shape[2], chunk)
    context = ClipContext(single_frame=single_frame, keep=len(bounds) > 1)
    pieces = []
    for start, end in bounds:
        pieces.append(stage(x_BCTHW[:, :, start:end], context))
        context.first_piece = False
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


class CausalConv3d(nn.Module):
    """3x3x3 convolution that sees this frame and the two before it: [B, C, T, H, W] -> [B, out, T, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3)

    def forward(self, x_BCTHW: Tensor, context: ClipContext) -> Tensor:
        x_BCTHW = context.extend(self, x_BCTHW, num_frames=2)
        return convolve_extended(x_BCTHW, self.conv.weight, self.conv.bias)


def convolve_extended(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1) -> Tensor:
    """Convolve a piece that has its history in front; `padding` in height and width, 0 where it is there."""
    if _misses_fast_conv3d(x_BCTHW):
        few = x_BCTHW[:, 0].numel() <= weight.shape[0]  # more kernels than places
        by = conv_by_products if few and has_quick_linear(x_BCTHW) else conv_by_frames
        return by(x_BCTHW, weight, bias, padding)
    return F.conv3d(x_BCTHW, weight, bias, padding=(0, padding, padding))


def conv_by_frames(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1) -> Tensor:
    """The same convolution as a 2D one per output frame, whose channels are those of all frames it sees."""
    taps = weight.shape[2]
    num_out = x_BCTHW.shape[2] - taps + 1
    windows = torch.cat([x_BCTHW[:, :, i : i + num_out] for i in range(taps)], dim=1)  # [B, taps*C, T, H, W]
    kernel = weight.transpose(1, 2).flatten(1, 2)
    return per_frame(lambda x: F.conv2d(x, kernel, bias, padding=padding), windows)


def conv_by_products(x_BCTHW: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 1) -> Tensor:
    """The same convolution as one matrix product of all 3x3x3 patches, for few places of many channels."""
    x_BTHWC = F.pad(x_BCTHW, (padding,) * 4).movedim(1, -1)
    patches = x_BTHWC.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # B, T, H, W, C, 3, 3, 3
    return quick_linear(patches.flatten(4), weight.flatten(1), bias).movedim(-1, 1)


def conv_by_taps(x_THWC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same convolution of frames with their border, for few kernels: what each tap of a kernel gives at
    every place is one matrix product, and the sum moves over the places. [T + 2, H + 2, W + 2, C] -> [O, T,
    H, W]."""
    size = [n - 2 for n in x_THWC.shape[:3]]
    taps = weight.permute(0, 2, 3, 4, 1).flatten(0, 3)  # (O t H W) x C
    parts = quick_linear(taps, x_THWC.flatten(0, 2)).view(len(weight), 3, 3, 3, *x_THWC.shape[:3])
    out_OTHW = x_THWC.new_zeros(len(weight), *size)
    for t, row, column in product(range(3), repeat=3):
        part = parts[:, t, row, column]
        out_OTHW += part[:, t : t + size[0], row : row + size[1], column : column + size[2]]
    return out_OTHW if bias is None else out_OTHW.add_(bias[:, None, None, None])


def _misses_fast_conv3d(x_BCTHW: Tensor) -> bool:
    """torch sends small float32 CPU convolutions on one thread to a kernel that is 4 to 20 times slower."""
    if x_BCTHW.device.type != "cpu" or x_BCTHW.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    batch = x_BCTHW.shape[0]
    return torch.get_num_threads() == 1 and batch < 16 and x_BCTHW.shape[:4].numel() <= 20480


def per_frame(function: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    """Apply a function of images [B*T, C, H, W] to every frame."""
    batch = x_BCTHW.shape[0]
    y = function(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


def pointwise(conv: nn.Conv3d, x_BCTHW: Tensor) -> Tensor:
    """A 1x1x1 convolution as the matrix product it is."""
    return quick_linear(x_BCTHW.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
