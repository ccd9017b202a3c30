"""Norm, SiLU and causal convolution in one, for inference: the plain layers with less memory and time.

Group norm and the decoder's modulation become one multiplication and addition per channel and place. What
they give is made strip by strip, in a buffer that already has the border and the frames before, so it is
never there as a whole. On the CPU in float32 large strips are convolved by Winograd's algorithm.

Shapes: B batch, C channels, T frames, H/W rows/columns of the features; t, h, w the same of the latents.
Channels are last in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff.vae import winograd
from cogvideox_diff.vae.causal_conv import CausalConv3d, ClipContext, convolve_extended

STRIP_BYTES = {"cpu": 2**25}  # of a strip's buffer, by device
OTHER_STRIP_BYTES = 2**28
WINOGRAD_STRIP_BYTES = 2**23  # what is made of it should stay in the cache
BLOCK = 2**18  # values of which the CPU takes statistics at once: they stay in the cache

PLAIN_ON_CPU = (torch.bfloat16,)  # whole convolutions of the library are quicker there than strips

Affine = tuple[Tensor, Tensor]  # scale and shift [B, T or 1, h, w, C] in float32


def applies(x_BCTHW: Tensor, context: ClipContext) -> bool:
    """Whether the plain layers may be left: without gradients, autocast and other processes; float64 takes
    no path of its own."""
    if torch.is_grad_enabled() or type(context) is not ClipContext or x_BCTHW.dtype == torch.float64:
        return False
    kind = x_BCTHW.device.type
    if kind == "cpu" and x_BCTHW.dtype in PLAIN_ON_CPU:
        return False
    return kind == "meta" or not torch.is_autocast_enabled(kind)


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
    block = max(BLOCK // places.shape[1], 1) if x_THWC.device.type == "cpu" else x_THWC[0, :, :, 0].numel()
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
    history = context.histories.get(conv)
    later = torch.empty_like(x_BTHWC[:, :1]).expand(-1, 0, -1, -1, -1)
    if context.keep:
        later = x_BTHWC.new_empty(len(x_BTHWC), 2, *x_BTHWC.shape[2:])
    out_BTHWO = x_BTHWC.new_empty(*x_BTHWC.shape[:4], conv.conv.out_channels)
    kernel = _winograd_kernel(conv.conv, x_BTHWC)
    for b in range(len(x_BTHWC)):
        scale_shift = (affine[0][b], affine[1][b])
        before = None if history is None else history[b]
        for rows, strip in _strips(x_BTHWC[b], scale_shift, before, aligned=kernel is not None):
            if context.keep:
                inner = strip[-2:, 1 : 1 + rows.stop - rows.start, 1 : 1 + x_BTHWC.shape[3]]
                later[b, :, rows] = inner
            _convolve(strip, conv.conv, kernel, out_BTHWO[b, :, rows])
    if context.keep:
        context.histories[conv] = later
    return out_BTHWO.movedim(-1, 1)


def channels_last(x_BCTHW: Tensor) -> Tensor:
    """[B, T, H, W, C], contiguous."""
    return x_BCTHW.movedim(1, -1).contiguous()


def _winograd_kernel(conv: nn.Conv3d, x_BTHWC: Tensor) -> Tensor | None:
    """The transformed kernel where it pays: it costs about as much as convolving 4 C places."""
    on_cpu = x_BTHWC.device.type == "cpu" and x_BTHWC.dtype == torch.float32
    most = max(conv.in_channels, conv.out_channels)
    wide = min(conv.in_channels, conv.out_channels) >= 32
    if not on_cpu or not wide or x_BTHWC.shape[1:4].numel() < 4 * most:
        return None
    return winograd.transform_kernel(conv.weight)


def _strips(
    x_THWC: Tensor, affine: Affine, before: Tensor | None, *, aligned: bool
) -> Iterator[tuple[slice, Tensor]]:
    """(rows of the result, their input [T + 2, rows + 2, W + 2, C]) from top to bottom, in one buffer.

    `aligned`: rows and columns of the buffer are filled up with zeros to whole tiles of Winograd's.
    """
    num_frames, height, width, channels = x_THWC.shape
    unit = winograd.TILE if aligned else 1
    columns = -(-width // unit) * unit
    row_bytes = (num_frames + 2) * (columns + 2) * channels * x_THWC.element_size()
    limit = WINOGRAD_STRIP_BYTES if aligned else STRIP_BYTES.get(x_THWC.device.type, OTHER_STRIP_BYTES)
    most = max(limit // row_bytes // unit, 1) * unit
    size = min(most, -(-height // unit) * unit)
    strip = x_THWC.new_zeros(num_frames + 2, size + 2, columns + 2, channels)
    for top in range(0, height, size):
        bottom = min(top + size, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)
        strip[:, : first - top + 1] = 0
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
    if x.dtype == torch.float32:
        F.silu(torch.addcmul(shift, x, scale, out=out), inplace=True)
    else:
        out.copy_(F.silu(torch.addcmul(shift, x.float(), scale), inplace=True))


def _convolve(strip_TRWC: Tensor, conv: nn.Conv3d, kernel: Tensor | None, out_TRWO: Tensor) -> None:
    if kernel is None:
        x_BCTRW = strip_TRWC.movedim(-1, 0)[None]
        out_TRWO.copy_(convolve_extended(x_BCTRW, conv.weight, conv.bias, padding=0)[0].movedim(0, -1))
        return
    num_frames, rows, columns = (n - 2 for n in strip_TRWC.shape[:3])
    fits = out_TRWO.shape[1:3] == (rows, columns)
    whole = out_TRWO if fits else out_TRWO.new_empty(num_frames, rows, columns, out_TRWO.shape[3])
    winograd.convolve(strip_TRWC, kernel, conv.bias, whole)
    if not fits:
        out_TRWO.copy_(whole[:, : out_TRWO.shape[1], : out_TRWO.shape[2]])
