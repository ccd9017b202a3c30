"""Norm, SiLU and causal convolution in one, for inference: the plain layers with less memory and time.

Group norm and the decoder's modulation become one multiplication and addition per channel and place. What
they give is made strip by strip, in a buffer that already has the border and the frames before, so it is
never there as a whole. On the CPU large strips are convolved in float32 by Winograd's algorithm, whatever the
type of the features: half precision's own convolution is no quicker, and rounds more.

Shapes: B batch, C channels, T frames, H/W rows/columns of the features; t, h, w the same of the latents.
Channels are last in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff.vae import winograd
from cogvideox_diff.vae.causal_conv import (
    CausalConv3d,
    ClipContext,
    conv_by_taps,
    convolve_extended,
    pointwise,
)
from shared.cpu_linear import has_quick_linear

if TYPE_CHECKING:
    from cogvideox_diff.vae.blocks import ResBlock

STRIP_BYTES = {"cpu": 2**25}  # of a strip's buffer, by device
OTHER_STRIP_BYTES = 2**27
WINOGRAD_STRIP_BYTES = 3 * 2**22  # what is made of it should stay in the cache
HALF_BY_WINOGRAD_ONLY = ("cpu",)  # devices where other strips of half precision are slower than plain layers
FEWEST_PLACES = {torch.float32: 4}  # per channel, for Winograd's algorithm; half precision's own is quicker
OTHER_FEWEST_PLACES = 40
FEW_KERNELS = 4  # their products pay where a convolution would fill its lanes with zeros
BLOCKS = {"cpu": 2**18}  # values of which statistics are taken at once; the CPU's stay in its cache
OTHER_BLOCK = 2**25

Affine = tuple[Tensor, Tensor]  # scale and shift [B, T or 1, h, w, C] in float32


def applies(conv: CausalConv3d, x_BCTHW: Tensor, context: ClipContext, *, modulated: bool) -> bool:
    """Whether the plain layers may be left, without gradients, autocast and other processes, and where it
    pays: float64 takes no path of its own, and half precision on the CPU only Winograd's and where a norm is
    `modulated` by the latents, whose modulation this makes cheap; else the library's own is as quick."""
    if torch.is_grad_enabled() or type(context) is not ClipContext or x_BCTHW.dtype == torch.float64:
        return False
    kind = x_BCTHW.device.type
    if x_BCTHW.dtype != torch.float32 and kind in HALF_BY_WINOGRAD_ONLY:
        return modulated and winograd_pays(conv.conv, x_BCTHW) and not torch.is_autocast_enabled(kind)
    return kind == "meta" or not torch.is_autocast_enabled(kind)


def winograd_pays(conv: nn.Conv3d, x_BCTHW: Tensor) -> bool:
    """On the CPU, for wide layers whose kernel need not be transformed for too few places."""
    fewest = FEWEST_PLACES.get(x_BCTHW.dtype, OTHER_FEWEST_PLACES)
    widths = conv.in_channels, conv.out_channels
    enough = x_BCTHW.shape[2:].numel() >= fewest * max(widths)
    return x_BCTHW.device.type == "cpu" and min(widths) >= 32 and enough


def norm_affine(norm: nn.GroupNorm, x_BTHWC: Tensor) -> Affine:
    """Group norm of every clip as scale and shift [B, 1, 1, 1, C]."""
    moments = [group_moments(x_THWC, norm.num_groups) for x_THWC in x_BTHWC]
    mean_BG, var_BG = (torch.stack(parts) for parts in zip(*moments, strict=True))
    repeats = norm.num_channels // norm.num_groups
    rstd_BC, mean_BC = (x.repeat_interleave(repeats, 1) for x in ((var_BG + norm.eps).rsqrt(), mean_BG))
    scale_BC = rstd_BC * norm.weight
    shift_BC = norm.bias - mean_BC * scale_BC
    scale, shift = (x.float()[:, None, None, None] for x in (scale_BC, shift_BC))
    return scale, shift


def group_moments(x_THWC: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [G] of every group, summed in blocks about a first guess and combined in float64:
    torch's own loses a digit where channels are last."""
    places = x_THWC.flatten(0, 2)
    block = max(BLOCKS.get(x_THWC.device.type, OTHER_BLOCK) // places.shape[1], 1)
    guess_C = places[:block].float().mean(0)
    sums_C, squares_C = (torch.zeros_like(guess_C, dtype=torch.float64) for _ in range(2))
    for part in places.split(block):
        distance = part.float() - guess_C
        sums_C += distance.sum(0)
        squares_C += distance.square_().sum(0)
    off_C, count = sums_C / len(places), len(places)
    mean_GC = (guess_C + off_C).unflatten(0, (num_groups, -1))
    mean_G = mean_GC.mean(1)
    within_GC = (squares_C / count - off_C.square()).unflatten(0, (num_groups, -1))
    return mean_G, (within_GC + (mean_GC - mean_G[:, None]).square()).mean(1)


def norm_conv(affine: Affine, conv: CausalConv3d, x_BCTHW: Tensor, context: ClipContext) -> Tensor:
    """Convolution of silu(scale * x + shift) [B, C, T, H, W] -> [B, O, T, H, W]."""
    x_BTHWC = channels_last(x_BCTHW)
    out_BTHWO = x_BTHWC.new_empty(*x_BTHWC.shape[:4], conv.conv.out_channels)
    for strip in _convolved(affine, conv, x_BTHWC, out_BTHWO, context):
        strip.put(add=False)
    return out_BTHWO.movedim(-1, 1)


def norm_conv_skip(
    affine: Affine, block: ResBlock, h_BCTHW: Tensor, x_BCTHW: Tensor, context: ClipContext
) -> Tensor:
    """`norm_conv` of `h` by the second convolution of `block`, plus the block's input `x`: in the place of
    `x`, or of `h` where the number of channels changes. One of the two is used up."""
    x_BTHWC, h_BTHWO = channels_last(x_BCTHW), channels_last(h_BCTHW)
    out_BTHWO = x_BTHWC if block.shortcut is None else h_BTHWO
    for strip in _convolved(affine, block.conv2, h_BTHWO, out_BTHWO, context):
        strip.put(add=block.shortcut is None)
        if block.shortcut is not None:
            skipped = pointwise(block.shortcut, x_BTHWC[strip.clip, None, :, strip.rows].movedim(-1, 1))
            strip.out.add_(skipped[0].movedim(0, -1))
    return out_BTHWO.movedim(-1, 1)


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Some rows of a clip: `x` is the input of a convolution, with its border and history, and
    `out` where the result goes, which may lie in the rows that the input was made of."""

    clip: int
    rows: slice
    x: Tensor  # [T + 2, R + 2, W + 2, C]
    conv: nn.Conv3d
    kernel: Tensor | None  # Winograd's
    out: Tensor  # [T, R, W, O]

    def put(self, *, add: bool) -> None:
        """Convolve; the result replaces what is there, or is added to it."""
        conv, out_TRWO = self.conv, self.out
        if self.kernel is not None:
            winograd.convolve(self.x, self.kernel, conv.bias, out_TRWO, add=add)
            return
        if conv.out_channels <= FEW_KERNELS and has_quick_linear(self.x):
            result_OTRW = conv_by_taps(self.x, conv.weight, conv.bias)
        else:
            result_OTRW = convolve_extended(self._as_batch(), conv.weight, conv.bias, padding=0)[0]
        result_TRWO = result_OTRW.movedim(0, -1)
        _ = out_TRWO.add_(result_TRWO) if add else out_TRWO.copy_(result_TRWO)

    def _as_batch(self) -> Tensor:
        """The input [1, C, T + 2, R + 2, W + 2]. torch takes it for channels last by the stride of the batch
        only; the CPU shall not, which would then turn the weights round for the few places that come here."""
        if self.x.device.type == "cpu":
            return self.x.movedim(-1, 0)[None]
        return self.x[None].movedim(-1, 1)


def _convolved(
    affine: Affine, conv: CausalConv3d, x_BTHWC: Tensor, out_BTHWO: Tensor, context: ClipContext
) -> Iterator[Strip]:
    """The strips of all clips, to be convolved one by one; keeps the last frames for the next piece."""
    history = context.histories.get(conv)
    history = None if history is None else history.movedim(1, -1)
    later = history  # its rows are replaced when the strip that is made of them is there
    if context.keep and history is None:
        later = x_BTHWC.new_empty(len(x_BTHWC), 2, *x_BTHWC.shape[2:])
    pays = winograd_pays(conv.conv, x_BTHWC.movedim(-1, 1))
    kernel = winograd.transform_kernel(conv.conv.weight) if pays else None
    for b, x_THWC in enumerate(x_BTHWC):
        before = None if history is None else history[b]
        for rows, x_TRWC in _strips(x_THWC, (affine[0][b], affine[1][b]), before, aligned=kernel is not None):
            if context.keep and later is not None:
                inner = x_TRWC[-2:, 1 : 1 + rows.stop - rows.start, 1 : 1 + x_THWC.shape[2]]
                later[b, :, rows] = inner
            out_TRWO = out_BTHWO[b, :, rows]
            yield Strip(clip=b, rows=rows, x=x_TRWC, conv=conv.conv, kernel=kernel, out=out_TRWO)
    if context.keep and later is not None:
        context.histories[conv] = later.movedim(-1, 1)


def channels_last(x_BCTHW: Tensor) -> Tensor:
    """[B, T, H, W, C], contiguous."""
    return x_BCTHW.movedim(1, -1).contiguous()


def _strips(
    x_THWC: Tensor, affine: Affine, before: Tensor | None, *, aligned: bool
) -> Iterator[tuple[slice, Tensor]]:
    """(rows of the result, their input [T + 2, rows + 2, W + 2, C]) from top to bottom, in one buffer. Of `x`
    and `before`, rows up to those that have been given are not read any more.

    `aligned`: for Winograd's algorithm, in float32, rows and columns filled up with zeros to whole tiles.
    """
    num_frames, height, width, channels = x_THWC.shape
    unit = winograd.TILE if aligned else 1
    columns = -(-width // unit) * unit
    dtype = torch.float32 if aligned else x_THWC.dtype
    row_bytes = (num_frames + 2) * (columns + 2) * channels * dtype.itemsize
    limit = WINOGRAD_STRIP_BYTES if aligned else STRIP_BYTES.get(x_THWC.device.type, OTHER_STRIP_BYTES)
    most = max(limit // row_bytes // unit, 1) * unit
    size = min(most, -(-height // unit) * unit)
    strip = x_THWC.new_zeros(num_frames + 2, size + 2, columns + 2, channels, dtype=dtype)
    for top in range(0, height, size):
        bottom = min(top + size, height)
        if top:
            strip[:, :2] = strip[:, size:].clone()  # the last rows of the strip before
        first, last = top + bool(top), min(bottom + 1, height)
        strip[:, last - top + 1 :] = 0
        inner = strip[:, first - top + 1 : last - top + 1, 1 : width + 1]
        _fill(inner[2:], x_THWC, affine, slice(first, last))
        inner[:2] = inner[2:3] if before is None else before[:, first:last]
        used = -(-(bottom - top) // unit) * unit
        yield slice(top, bottom), strip[:, : used + 2]


def _fill(out_TRWC: Tensor, x_THWC: Tensor, affine: Affine, rows: slice) -> None:
    """silu(scale * x + shift) of some rows; a scale and shift serve a square of places."""
    latent_rows, latent_columns = affine[0].shape[1:3]
    wanted = torch.arange(rows.start, rows.stop, device=x_THWC.device) // (x_THWC.shape[1] // latent_rows)
    scale, shift = (part.index_select(1, wanted)[:, :, :, None] for part in affine)  # t, R, w, 1, C
    x = x_THWC[:, rows].unflatten(2, (latent_columns, -1))
    out = out_TRWC.unflatten(2, (latent_columns, -1))
    if out.dtype == torch.float32:
        F.silu(torch.addcmul(shift, x, scale, out=out), inplace=True)
    else:
        out.copy_(F.silu(torch.addcmul(shift, x, scale), inplace=True))
