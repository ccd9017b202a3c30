"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cogvideox_diff.schedule import NoiseSchedule


def diffusion_loss(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x0_BTCHW: Tensor,
    text_BLD: Tensor,
    timesteps_B: Tensor,
    noise_BTCHW: Tensor,
    *,
    image_latents_BTCHW: Tensor | None = None,
    ofs: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Per-sample loss [B] in float32: the mean squared error of v, which equals the released loss, the
    error of x0 weighted with 1/(1 - abar). Image latents go behind the noisy latents on the channels.
    `dtype` is what the model computes in (None: as the latents come)."""
    x_t = schedule.add_noise(x0_BTCHW, noise_BTCHW, timesteps_B)
    if image_latents_BTCHW is not None:
        x_t = torch.cat([x_t, image_latents_BTCHW], dim=2)
    if dtype is not None:
        x_t, text_BLD = x_t.to(dtype), text_BLD.to(dtype)
    v = model(x_t, text_BLD, timesteps_B, ofs)
    target = schedule.velocity(x0_BTCHW, noise_BTCHW, timesteps_B)
    return (v.float() - target.float()).square().flatten(1).mean(dim=1)
