"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cogvideox_diff.schedule import NoiseSchedule

BINS = 5  # of the timesteps, for the log


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


def loss_by_timestep(
    losses_B: Tensor, timesteps_B: Tensor, num_timesteps: int
) -> dict[str, tuple[float, int]]:
    """Figures to log: the (sum, count) of the losses in each fifth of the timesteps that has any."""
    places_B = (timesteps_B * BINS // num_timesteps).to(losses_B.device)
    figures = {}
    for place in places_B.unique().tolist():
        inside = losses_B.detach()[places_B == place]
        first, end = (-(-k * num_timesteps // BINS) for k in (place, place + 1))
        figures[f"timesteps{first}-{end - 1}"] = (float(inside.sum()), len(inside))
    return figures


def summed(figures: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Counts and (sum, count) pairs of two batches together."""
    both = {**figures, **more}
    for name in figures.keys() & more.keys():
        a, b = figures[name], more[name]
        both[name] = (a[0] + b[0], a[1] + b[1]) if isinstance(a, tuple) else a + b
    return both
