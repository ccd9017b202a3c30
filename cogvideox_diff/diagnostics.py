"""The training loss on true clips by noise level.

Legend: B timesteps, T latent frames, C latent channels, H/W latent rows/columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideox_diff import conditioning
from cogvideox_diff.generation import Engine, Item
from cogvideox_diff.geometry import VideoGeometry
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import draw_noise
from cogvideox_diff.text_encoder import encode_prompts
from cogvideox_diff.training.objective import diffusion_loss
from shared.video import Video

NUM_BINS, PARTS = 5, 4  # equal bins of the timesteps, and timesteps measured in each


@torch.no_grad()
def diagnose(engine: Engine, videos: Sequence[Video], prompts: Sequence[str]) -> dict[str, list[float]]:
    """Per clip the mean squared error of v in five bins of timesteps: `loss_000_199` and so on, with the same
    noise for every model of one latent size. Clips are cut to the model's frames and resized.

    ValueError for a model that needs an image, or a clip whose frames the model cannot take."""
    if engine.config.transformer.in_channels != engine.config.transformer.out_channels:
        raise ValueError("an image-to-video model has no loss without an image")
    found: dict[str, list[float]] = {}
    for video, prompt in zip(videos, prompts, strict=True):
        for name, value in clip_losses(engine, video, prompt).items():
            found.setdefault(name, []).append(value)
    return found


def clip_losses(engine: Engine, video: Video, prompt: str) -> dict[str, float]:
    """Of one clip, timestep by timestep so that memory stays that of one sample."""
    schedule = NoiseSchedule.from_config(engine.config.schedule)
    x0 = clip_latents(engine, video)
    with engine.placement.computing(engine.parts.text_encoder):
        text = encode_prompts(engine.parts.text_encoder, engine.tokenizer, [prompt])[0]
    text, x0 = (x.to(engine.device, engine.dtype) for x in (text, x0))
    shape, width = tuple(x0.shape[1:]), schedule.num_timesteps // NUM_BINS
    losses: dict[str, float] = {}
    with engine.placement.computing(engine.parts.transformer):
        for first in range(0, width * NUM_BINS, width):
            total = 0.0
            for part in range(PARTS):
                timestep = first + (2 * part + 1) * width // (2 * PARTS)
                noise = draw_noise(shape, [Item(prompt="", seed=timestep).random("diagnostics")]).to(x0)
                steps_B = torch.tensor([timestep], device=x0.device)
                loss = diffusion_loss(engine.parts.transformer, schedule, x0, text, steps_B, noise)
                total += float(loss) / PARTS
            losses[f"loss_{first:03d}_{first + width - 1:03d}"] = total
    return losses


def clip_latents(engine: Engine, video: Video) -> Tensor:
    """The scaled mean of the posterior [1, T, C, H, W], padded as in training."""
    config = engine.config
    size = config.geometry
    frames = min(video.num_frames, size.num_frames)
    geometry = VideoGeometry.of(config, height=size.height, width=size.width, num_frames=frames)
    pixels = conditioning.video_pixels(video, geometry)[None].to(engine.device, engine.dtype)
    with engine.placement.computing(engine.parts.vae):
        z_BCTHW = engine.parts.vae.encode(pixels, tiled=engine.tiled, sliced=True).mode()
    return conditioning.clean_latents(z_BCTHW.transpose(1, 2), config)
