"""The VAE alone: video to latents and back, without the rest of the model in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from cogvideox_diff import conditioning
from cogvideox_diff.config import VAEConfig
from cogvideox_diff.formats import ModelFolder
from cogvideox_diff.geometry import (
    MOST_FRAMES,
    MOST_SIDE,
    FitFrames,
    fit_frames,
    latent_frames,
    nearest_multiple,
)
from cogvideox_diff.model_files import empty_net, read_part
from cogvideox_diff.vae.autoencoder import CausalVAE, scale_latents
from shared.checkpoints import load_into
from shared.errors import SettingError
from shared.runtime import check_finite, generator
from shared.transforms import fit_video
from shared.video import Video

Draw = Literal["sample", "mode"]


def load_vae(folder: ModelFolder, dtype: torch.dtype, device: torch.device | str = "cpu") -> CausalVAE:
    """Read a model's VAE and nothing else of it."""
    net = load_into(empty_net("vae", folder.config), read_part(folder, "vae"), dtype=dtype)
    return cast(CausalVAE, net.eval().requires_grad_(False).to(device))


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """A size that the VAE can encode: 4k+1 frames, sides that are multiples of 8 (of the released VAE)."""

    num_frames: int
    height: int  # pixels
    width: int


def clip_size(
    config: VAEConfig,
    video: Video,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fit: FitFrames | None = None,
) -> ClipSize:
    """The size to encode `video` in, by default its own. SettingError names the nearest legal one."""
    count = video.num_frames if num_frames is None else num_frames
    if count > MOST_FRAMES or max(height or 0, width or 0) > MOST_SIDE:
        raise SettingError(
            f"at most {MOST_FRAMES} frames and {MOST_SIDE} pixels of height and width are legal"
        )
    if fit is not None:
        count = min(count, video.num_frames) if fit == "trim" else count
        count = fit_frames(count, config.time_factor, count + config.time_factor, fit)
    latent_frames(count, config.time_factor)  # refuses what is illegal
    if count > video.num_frames and fit is None:
        raise SettingError(f"num_frames {count} exceeds the given video's {video.num_frames} frames")
    size = ClipSize(num_frames=count, height=height or video.height, width=width or video.width)
    for name, side in (("height", size.height), ("width", size.width)):
        if side < 1 or side % config.space_factor:
            nearest = nearest_multiple(side, config.space_factor)
            raise SettingError(
                f"{name} must be a multiple of {config.space_factor}, got {side}; nearest: {nearest}"
            )
    return size


def fitted(video: Video, size: ClipSize) -> Video:
    """The video in that size: covered and cut; its first frames, and its last one again where it is short."""
    frames = conditioning.first_frames(video.frames, size.num_frames)
    return fit_video(Video(frames=frames, fps=video.fps), size.height, size.width)


@torch.no_grad()
def encode_video(
    vae: CausalVAE, video: Video, *, draw: Draw = "mode", seed: int = 0, tiled: bool = False
) -> Tensor:
    """Latents [T, C, H, W] at the transformer's scale, float32 on the CPU: the posterior's "mode", or a
    "sample" drawn with `seed`. ValueError for sizes that the VAE cannot encode."""
    if draw not in ("sample", "mode"):
        raise SettingError(f"the posterior gives a sample or its mode, got {draw!r}")
    weight = next(vae.parameters())
    posterior = vae.encode(video.to_pixels()[None].to(weight), tiled=tiled)
    z_BCTHW = posterior.mode()
    if draw == "sample":
        # [C, T, H, W] of noise drawn as [T, C, H, W], the order in which the pipeline draws it
        shape = z_BCTHW[0].transpose(0, 1).shape
        noise = torch.randn(*shape, generator=generator(seed, 0, "posterior"))
        z_BCTHW = posterior.sample(noise.transpose(0, 1)[None].to(z_BCTHW))
    return check_finite("latents", scale_latents(z_BCTHW, vae.config)[0].transpose(0, 1).float().cpu())


@torch.no_grad()
def decode_video(vae: CausalVAE, latents_TCHW: Tensor, fps: float, *, tiled: bool = False) -> Video:
    """The video of scaled latents; the inverse of `encode_video` up to what the VAE loses."""
    pixels = conditioning.decode(vae, latents_TCHW[None].to(next(vae.parameters())), tiled=tiled)
    return Video.from_pixels(check_finite("decoded frames", pixels)[0], fps)


def psnr(video: Video, other: Video) -> float:
    """Peak signal-to-noise ratio over all frames in dB; infinite for equal ones."""
    error = (video.frames.double() - other.frames.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf
