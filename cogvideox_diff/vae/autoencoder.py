"""The 3D causal VAE of CogVideoX (arXiv 2408.06072, section 2.1).

Shapes: B batch, C channels, T frames, H/W rows/columns of the pixels; Z, t, h, w the same of the latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from cogvideox_diff.config import VAEConfig
from cogvideox_diff.vae.blocks import ClipNorm, Downsample, ResBlock, SpatialNorm, Upsample, norm_conv
from cogvideox_diff.vae.causal_conv import CausalConv3d, ClipContext, RunStage, run_causal
from cogvideox_diff.vae.tiling import decode_tiles, encode_tiles, run_tiled


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """The encoder's diagonal Gaussian over latents; mean and logvar are [B, Z, t, h, w], not scaled."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments_BMthw: Tensor) -> Posterior:
        mean, logvar = moments_BMthw.chunk(2, dim=1)
        return cls(mean=mean, logvar=logvar.clamp(-30.0, 20.0))

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """`noise` is standard normal, shaped as the mean."""
        return self.mean + torch.exp(self.logvar / 2) * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over a clip and averaged over the batch."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return terms.sum() / (2 * self.mean.shape[0])


def scale_latents(z: Tensor, config: VAEConfig) -> Tensor:
    """From the VAE's latents to those the transformer sees."""
    return z * config.scaling_factor


def unscale_latents(z: Tensor, config: VAEConfig) -> Tensor:
    """From the transformer's latents to those the VAE decodes."""
    return z / config.scaling_factor


def scale_image_latents(z: Tensor, config: VAEConfig) -> Tensor:
    """As `scale_latents` for the condition image, which the 1.5 models divide by the factor instead."""
    return z / config.scaling_factor if config.invert_scale_latents else scale_latents(z, config)


class EncoderLevel(nn.Module):
    """Only holds the layers: the encoder runs them itself, so that nobody keeps a level's input meanwhile."""

    def __init__(self, config: VAEConfig, level: int) -> None:
        super().__init__()
        width = config.widths[level]
        norm = partial(ClipNorm, groups=config.norm_groups, eps=config.norm_eps)
        inputs = [config.widths[max(level - 1, 0)]] + [width] * (config.blocks_per_level - 1)
        self.blocks = nn.ModuleList(ResBlock(channels, width, norm) for channels in inputs)
        is_last = level == len(config.widths) - 1
        self.downsample = None if is_last else Downsample(width, halves_time=level < config.temporal_levels)


class Encoder(nn.Module):
    """Pixels in -1..1 [B, 3, T, H, W] -> moments (mean, log-variance) [B, 2*Z, t, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.frame_unit = config.time_factor
        last = config.widths[-1]
        norm = partial(ClipNorm, groups=config.norm_groups, eps=config.norm_eps)
        self.conv_in = CausalConv3d(3, config.widths[0])
        self.levels = nn.ModuleList(EncoderLevel(config, level) for level in range(len(config.widths)))
        self.middle = nn.ModuleList(ResBlock(last, last, norm) for _ in range(2))
        self.norm_out = norm(last)
        self.conv_out = CausalConv3d(last, 2 * config.latent_channels)

    def forward(self, x_BCTHW: Tensor, context: ClipContext) -> Tensor:
        x_BCTHW = x_BCTHW.contiguous(memory_format=torch.channels_last_3d)
        x_BCTHW = self.conv_in(x_BCTHW, context)
        for level in cast("Iterable[EncoderLevel]", self.levels):
            for block in level.blocks:
                x_BCTHW = block(x_BCTHW, None, context)
            if level.downsample is not None:
                x_BCTHW = level.downsample(x_BCTHW, context)
        for block in self.middle:
            x_BCTHW = block(x_BCTHW, None, context)
        return norm_conv(self.norm_out, self.conv_out, x_BCTHW, None, context)


class DecoderLevel(nn.Module):
    """Only holds the layers, as `EncoderLevel`."""

    def __init__(self, config: VAEConfig, level: int) -> None:
        super().__init__()
        widths = config.widths[::-1]
        width = widths[level]
        norm = partial(
            SpatialNorm,
            latent_channels=config.latent_channels,
            groups=config.norm_groups,
            eps=config.norm_eps,
        )
        inputs = [widths[max(level - 1, 0)]] + [width] * config.blocks_per_level
        self.blocks = nn.ModuleList(ResBlock(channels, width, norm) for channels in inputs)
        is_last = level == len(widths) - 1
        self.upsample = None if is_last else Upsample(width, doubles_time=level < config.temporal_levels)


class Decoder(nn.Module):
    """Latents [B, Z, t, h, w] -> pixels [B, 3, T, H, W]; level 0 is the deepest."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.frame_unit = 1
        deepest = config.widths[-1]
        norm = partial(
            SpatialNorm,
            latent_channels=config.latent_channels,
            groups=config.norm_groups,
            eps=config.norm_eps,
        )
        self.conv_in = CausalConv3d(config.latent_channels, deepest)
        self.middle = nn.ModuleList(ResBlock(deepest, deepest, norm) for _ in range(2))
        self.levels = nn.ModuleList(DecoderLevel(config, level) for level in range(len(config.widths)))
        self.norm_out = norm(config.widths[0])
        self.conv_out = CausalConv3d(config.widths[0], 3)

    def forward(self, z_BZthw: Tensor, context: ClipContext) -> Tensor:
        z_BZthw = z_BZthw.contiguous(memory_format=torch.channels_last_3d)
        x_BCTHW = self.conv_in(z_BZthw, context)
        for block in self.middle:
            x_BCTHW = block(x_BCTHW, z_BZthw, context)
        for level in cast("Iterable[DecoderLevel]", self.levels):
            for block in level.blocks:
                x_BCTHW = block(x_BCTHW, z_BZthw, context)
            if level.upsample is not None:
                x_BCTHW = level.upsample(x_BCTHW, context)
        return norm_conv(self.norm_out, self.conv_out, x_BCTHW, z_BZthw, context)


class CausalVAE(nn.Module):
    """Clips <-> latents: 4k+1 frames are k+1 latent frames, 8x8 pixels one latent place (released sizes).

    A single image is a clip of one frame. `tiled` follows the diffusers rule and changes the result; `sliced`
    runs one clip of the batch at a time and does not. Group norm takes its statistics per clip and piece.
    `run` takes the encoder and the decoder through a clip (context parallelism replaces it).
    """

    def __init__(self, config: VAEConfig, run: RunStage = run_causal) -> None:
        super().__init__()
        self.config = config
        self.run = run
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels_BCTHW: Tensor, *, tiled: bool = False, sliced: bool = False) -> Posterior:
        """Pixels in -1..1 [B, 3, T, H, W], T = 4k+1, H and W multiples of 8 -> posterior [B, Z, k+1, h, w].

        Raises ValueError for other sizes, naming the nearest legal ones.
        """
        check_clip(pixels_BCTHW, self.config)
        stage = partial(
            self.run,
            self.encoder,
            chunk=self.config.encode_frames,
            single_frame="first_piece",
        )
        tiles = encode_tiles(self.config) if tiled else None
        return Posterior.from_moments(run_tiled(stage, pixels_BCTHW, tiles, sliced=sliced))

    def decode(self, z_BZthw: Tensor, *, tiled: bool = False, sliced: bool = False) -> Tensor:
        """Unscaled latents [B, Z, k+1, h, w] -> pixels, about -1..1, [B, 3, 4k+1, 8h, 8w].

        Even latent counts: see `VAEConfig.single_frame`. Raises ValueError for a wrong channel count.
        """
        if z_BZthw.ndim != 5 or z_BZthw.shape[1] != self.config.latent_channels or z_BZthw.shape[2] == 0:
            raise ValueError(
                f"latents must be [B, {self.config.latent_channels}, t, h, w], got {list(z_BZthw.shape)}"
            )
        stage = partial(
            self.run,
            self.decoder,
            chunk=self.config.decode_latents,
            single_frame=self.config.single_frame,
        )
        return run_tiled(stage, z_BZthw, decode_tiles(self.config) if tiled else None, sliced=sliced)


def check_clip(pixels_BCTHW: Tensor, config: VAEConfig) -> None:
    """Raise ValueError unless the clip's size can be encoded without loss of frames, rows or columns."""
    if pixels_BCTHW.ndim != 5 or pixels_BCTHW.shape[1] != 3:
        raise ValueError(f"a clip must be [B, 3, T, H, W], got {list(pixels_BCTHW.shape)}")
    num_frames, *sides = pixels_BCTHW.shape[2:]
    if (num_frames - 1) % config.time_factor:
        below = max(num_frames - 1, 0) // config.time_factor * config.time_factor + 1
        raise ValueError(
            f"got {num_frames} frames; legal are {config.time_factor}k+1, "
            f"nearest {below} or {below + config.time_factor}"
        )
    for name, side in zip(("height", "width"), sides, strict=True):
        if side % config.space_factor or side == 0:
            below = side // config.space_factor * config.space_factor
            nearest = f"{below} or {below + config.space_factor}" if below else str(config.space_factor)
            raise ValueError(
                f"got {name} {side}; legal are multiples of {config.space_factor}, nearest {nearest}"
            )
