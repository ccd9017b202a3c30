"""What the transformer is given besides the text: starting latents and image latents of the three tasks.

Legend: B batch, T latent frames, C latent channels, H/W latent rows/columns; pixels are [B, 3, frames, h, w].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideox_diff.config import CogVideoXConfig, FramePadding
from cogvideox_diff.geometry import VideoGeometry, frames_to_pad
from cogvideox_diff.vae.autoencoder import CausalVAE, scale_image_latents, scale_latents, unscale_latents
from shared.transforms import fit_video, resize_crop, to_signed
from shared.video import Video


def image_pixels(image: Tensor, geometry: VideoGeometry) -> Tensor:
    """A uint8 [h, w, 3] image made to cover the video's size: [3, 1, height, width] in -1..1."""
    fitted = resize_crop(image.permute(2, 0, 1)[None], geometry.height, geometry.width)
    return to_signed(fitted).permute(1, 0, 2, 3)  # [1, C, h, w] -> [C, 1, h, w]


def video_pixels(video: Video, geometry: VideoGeometry) -> Tensor:
    """The video's first frames in the wanted size: [3, frames, height, width] in -1..1. A video that is too
    short goes on with its last frame."""
    start = Video(frames=first_frames(video.frames, geometry.num_frames), fps=video.fps)
    return fit_video(start, geometry.height, geometry.width).to_pixels()


def first_frames(frames: Tensor, count: int) -> Tensor:
    """The first `count` of frames [T, ...], of which the last is repeated where there are fewer."""
    return frames[torch.arange(count).clamp(max=len(frames) - 1)]


@torch.no_grad()
def encode(
    vae: CausalVAE, pixels: Tensor, noise_BTCHW: Tensor, *, tiled: bool = False, sliced: bool = True
) -> Tensor:
    """A sample of the posterior, unscaled [B, T, C, H, W]; `noise_BTCHW` is standard normal."""
    posterior = vae.encode(pixels, tiled=tiled, sliced=sliced)
    noise = noise_BTCHW.transpose(1, 2).to(posterior.mean)  # [B, T, C, H, W] -> [B, C, T, H, W]
    return posterior.sample(noise).transpose(1, 2)


@torch.no_grad()
def decode(vae: CausalVAE, latents_BTCHW: Tensor, *, tiled: bool = False, sliced: bool = True) -> Tensor:
    """Scaled latents without padding -> pixels [B, 3, frames, h, w]."""
    z_BCTHW = unscale_latents(latents_BTCHW, vae.config).transpose(1, 2)
    return vae.decode(z_BCTHW, tiled=tiled, sliced=sliced)


def image_latents(z_B1CHW: Tensor, config: CogVideoXConfig, geometry: VideoGeometry) -> Tensor:
    """Image-to-video: the image's scaled latents, then zeros up to the padded length [B, T, C, H, W].

    In 1.5 the image so stands at the padding frame in front, as in diffusers. The models read this behind the
    noisy latents' channels at every step."""
    scaled = scale_image_latents(z_B1CHW, config.vae)
    return F.pad(scaled, (0, 0, 0, 0, 0, 0, 0, geometry.padded_latent_frames - 1))


def clean_latents(z_BTCHW: Tensor, config: CogVideoXConfig, padding: FramePadding = "front") -> Tensor:
    """Video-to-video: the clip's scaled latents, where pairs need it with copies of the first frame in front
    (as in 1.5's training; diffusers refuses odd counts) or of the last one at the back."""
    scaled = scale_latents(z_BTCHW, config.vae)
    count = frames_to_pad(scaled.shape[1], config.transformer.patch_size[0], padding)
    if padding == "front":
        return torch.cat([scaled[:, :1].expand(-1, count, -1, -1, -1), scaled], dim=1)
    return torch.cat([scaled, scaled[:, -1:].expand(-1, count, -1, -1, -1)], dim=1)


def known_frames(prefix_BTCHW: Tensor, geometry: VideoGeometry) -> Tensor:
    """Scaled latents that a video begins with, behind copies of the first one where padding is in front."""
    count = geometry.own_frames.start
    return torch.cat([prefix_BTCHW[:, :1].expand(-1, count, -1, -1, -1), prefix_BTCHW], dim=1)


def drop_padding(x_BTCHW: Tensor, geometry: VideoGeometry) -> Tensor:
    """The latents of the video itself."""
    return x_BTCHW[:, geometry.own_frames]


def add_noise(x0: Tensor, noise: Tensor, abar: float) -> Tensor:
    """The sample at level `abar`: where video-to-video starts."""
    return abar**0.5 * x0 + (1 - abar) ** 0.5 * noise
