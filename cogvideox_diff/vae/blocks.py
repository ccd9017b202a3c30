"""Layers of the 3D causal VAE.

Shapes: B batch, C channels, T frames, H/W rows/columns of the features; Z, t, h, w the same of the latents
that condition the decoder's norms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff.vae import fast
from cogvideox_diff.vae.causal_conv import CausalConv3d, ClipContext, per_frame, pointwise

FRAMES_BYTES = 2**28  # of frames that are enlarged at once without gradients


def halve_time(x_BCTHW: Tensor, single_frame: bool) -> Tensor:
    """Average neighbouring frames, except a single first one: [B, C, 2k+1, H, W] -> [B, C, k+1, H, W]."""
    first_BCTHW, rest_BCTHW = x_BCTHW.tensor_split([int(single_frame)], dim=2)
    num_pairs = rest_BCTHW.shape[2] // 2
    even_BCTHW, odd_BCTHW = rest_BCTHW[:, :, : 2 * num_pairs : 2], rest_BCTHW[:, :, 1 : 2 * num_pairs : 2]
    if torch.is_grad_enabled():
        return torch.cat([first_BCTHW, (even_BCTHW + odd_BCTHW) / 2], dim=2)
    size = x_BCTHW.shape[0], int(single_frame) + num_pairs, *x_BCTHW.shape[3:], x_BCTHW.shape[1]
    halved_BCTHW = x_BCTHW.new_empty(size).movedim(-1, 1)  # channels stay last in memory
    halved_BCTHW[:, :, : int(single_frame)] = first_BCTHW
    torch.add(even_BCTHW, odd_BCTHW, out=halved_BCTHW[:, :, int(single_frame) :]).div_(2)
    return halved_BCTHW


def stretch_time(x_BCTHW: Tensor, num_frames: int, single_frame: bool) -> Tensor:
    """Repeat every frame equally often up to `num_frames`, a single first one not at all."""
    if num_frames == x_BCTHW.shape[2]:
        return x_BCTHW
    single = int(single_frame)
    times = torch.arange(single, num_frames, device=x_BCTHW.device)
    repeat = (num_frames - single) // (x_BCTHW.shape[2] - single)
    source = F.pad(times.sub(single).div(repeat, rounding_mode="floor") + single, (single, 0))
    return x_BCTHW.movedim(1, -1).index_select(1, source).movedim(-1, 1)  # channels stay last in memory


class ClipNorm(nn.Module):
    """Group norm of the encoder; it takes the latents only to be called as the decoder's norm is."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x_BCTHW: Tensor, z_BZthw: Tensor | None, context: ClipContext) -> Tensor:
        return context.group_norm(self.norm, x_BCTHW)

    def affine(self, x_BCTHW: Tensor, z_BZthw: Tensor | None, context: ClipContext) -> fast.Affine:
        """The same as a scale and shift."""
        return fast.norm_affine(self.norm, fast.channels_last(x_BCTHW))


class SpatialNorm(nn.Module):
    """Group norm of the decoder, scaled and shifted by the nearest latent (MoVQ, arXiv 2209.09002).

    The two functions are taken at the latents' own size and then spread over the features, which commutes.
    """

    def __init__(self, channels: int, latent_channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.scale = nn.Conv3d(latent_channels, channels, kernel_size=1)
        self.shift = nn.Conv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x_BCTHW: Tensor, z_BZthw: Tensor, context: ClipContext) -> Tensor:
        scale_BCThw, shift_BCThw = self.maps(z_BZthw, x_BCTHW.shape[2], context)
        return modulate(context.group_norm(self.norm, x_BCTHW), scale_BCThw, shift_BCThw)

    def maps(self, z_BZthw: Tensor, num_frames: int, context: ClipContext) -> tuple[Tensor, Tensor]:
        """The scale and shift [B, C, T, h, w] that the latents give."""
        single = context.has_single_frame(num_frames)
        scale_BCThw, shift_BCThw = (
            stretch_time(pointwise(conv, z_BZthw), num_frames, single) for conv in (self.scale, self.shift)
        )
        return scale_BCThw, shift_BCThw

    def affine(self, x_BCTHW: Tensor, z_BZthw: Tensor, context: ClipContext) -> fast.Affine:
        """Norm and modulation as one scale and shift."""
        scale, shift = fast.norm_affine(self.norm, fast.channels_last(x_BCTHW))
        more, plus = (x.float().movedim(1, -1) for x in self.maps(z_BZthw, x_BCTHW.shape[2], context))
        return more * scale, torch.addcmul(plus, more, shift)


def modulate(x_BCTHW: Tensor, scale_BCThw: Tensor, shift_BCThw: Tensor) -> Tensor:
    """x * scale + shift, where every scale and shift serves a square of x.

    They are enlarged in memory only for gradients, where summing over squares is slow in a broadcast's.
    """
    height, width = scale_BCThw.shape[3:]
    if torch.is_grad_enabled():
        size = list(x_BCTHW.shape[3:])
        return torch.addcmul(enlarge(shift_BCThw, size), x_BCTHW, enlarge(scale_BCThw, size))
    x_squares = x_BCTHW.unflatten(4, (width, -1)).unflatten(3, (height, -1))  # [B, C, T, h, rows, w, columns]
    y_squares = torch.addcmul(shift_BCThw[..., None, :, None], x_squares, scale_BCThw[..., None, :, None])
    return y_squares.flatten(5, 6).flatten(3, 4)


def enlarge(x_BCThw: Tensor, size: list[int]) -> Tensor:
    """Nearest resize of every frame to `size` (height, width)."""
    return (
        per_frame(lambda x: F.interpolate(x, size=size), x_BCThw)
        if list(x_BCThw.shape[3:]) != size
        else x_BCThw
    )


def norm_conv(
    norm: nn.Module,
    conv: CausalConv3d,
    x_BCTHW: Tensor,
    z_BZthw: Tensor | None,
    context: ClipContext,
) -> Tensor:
    """Norm, SiLU and causal convolution; without gradients in one (`fast`), which rounds otherwise."""
    if _in_one(norm, conv, x_BCTHW, context):
        return fast.norm_conv(norm.affine(x_BCTHW, z_BZthw, context), conv, x_BCTHW, context)  # type: ignore[arg-type]
    return conv(F.silu(norm(x_BCTHW, z_BZthw, context)), context)


def _in_one(norm: nn.Module, conv: CausalConv3d, x_BCTHW: Tensor, context: ClipContext) -> bool:
    known = isinstance(norm, ClipNorm | SpatialNorm)
    return known and fast.applies(conv, x_BCTHW, context, modulated=isinstance(norm, SpatialNorm))


class ResBlock(nn.Module):
    """Two times norm, SiLU and causal convolution, plus the input."""

    def __init__(self, in_channels: int, out_channels: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = make_norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCTHW: Tensor, z_BZthw: Tensor | None, context: ClipContext) -> Tensor:
        """Without gradients the input may be used up."""
        h_BCTHW = norm_conv(self.norm1, self.conv1, x_BCTHW, z_BZthw, context)
        if _in_one(self.norm2, self.conv2, h_BCTHW, context):
            affine = self.norm2.affine(h_BCTHW, z_BZthw, context)  # type: ignore[arg-type]
            return fast.norm_conv_skip(affine, self, h_BCTHW, x_BCTHW, context)
        h_BCTHW = norm_conv(self.norm2, self.conv2, h_BCTHW, z_BZthw, context)
        skipped = x_BCTHW if self.shortcut is None else pointwise(self.shortcut, x_BCTHW)
        return h_BCTHW + skipped if torch.is_grad_enabled() else h_BCTHW.add_(skipped)


class Downsample(nn.Module):
    """Halve height and width, and time first where `halves_time`."""

    def __init__(self, channels: int, *, halves_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        self.halves_time = halves_time

    def forward(self, x_BCTHW: Tensor, context: ClipContext) -> Tensor:
        if self.halves_time:
            x_BCTHW = halve_time(x_BCTHW, context.has_single_frame(x_BCTHW.shape[2]))
        return per_frame(lambda x: self.conv(F.pad(x, (0, 1, 0, 1))), x_BCTHW)


class Upsample(nn.Module):
    """Double height and width, and time where `doubles_time`."""

    def __init__(self, channels: int, *, doubles_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.doubles_time = doubles_time

    def forward(self, x_BCTHW: Tensor, context: ClipContext) -> Tensor:
        num_frames = x_BCTHW.shape[2]
        x_BCTHW = per_frame(self.upsample_frames, x_BCTHW)
        if not self.doubles_time:
            return x_BCTHW
        single = context.has_single_frame(num_frames)  # equal frames are convolved once and repeated after
        return stretch_time(x_BCTHW, 2 * num_frames - single, single)

    def upsample_frames(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W]; on CPU in float32 by `convolve_doubled`, which rounds otherwise."""
        most = max(FRAMES_BYTES // (4 * x_NCHW[0].numel() * x_NCHW.element_size()), 1)
        if torch.is_grad_enabled():
            return self._upsampled(x_NCHW)
        if len(x_NCHW) <= most:
            return self._upsampled(x_NCHW).contiguous(memory_format=torch.channels_last)
        height, width = x_NCHW.shape[2:]
        out_NHWC = x_NCHW.new_empty(len(x_NCHW), 2 * height, 2 * width, self.conv.out_channels)
        for part, out in zip(x_NCHW.split(most), out_NHWC.movedim(-1, 1).split(most), strict=True):
            out.copy_(self._upsampled(part))
        return out_NHWC.movedim(-1, 1)

    def _upsampled(self, x_NCHW: Tensor) -> Tensor:
        if x_NCHW.device.type == "cpu" and x_NCHW.dtype == torch.float32:
            return convolve_doubled(x_NCHW, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x_NCHW, scale_factor=2.0))


def convolve_doubled(x_NCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution of the image doubled by nearest neighbour, with 4/9 of the multiplications.

    Each doubled pixel meets its own source and three others, so both steps are one transposed convolution
    whose 4x4 kernel is the 3x3 one (mirrored) spread over 2x2 places.
    """
    kernel = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    kernel = kernel[:, :, 1:, 1:] + kernel[:, :, 1:, :-1] + kernel[:, :, :-1, 1:] + kernel[:, :, :-1, :-1]
    return F.conv_transpose2d(x_NCHW, kernel, bias, stride=2, padding=1)
