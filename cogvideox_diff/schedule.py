"""Noise levels: x_t = a x0 + s noise with a = sqrt(abar_t) and s = sqrt(1 - abar_t); v = a noise - s x0.

CogVideoX paper section 2.3; Lin et al. 2024 for the zero terminal SNR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideox_diff.config import ScheduleConfig


def shifted_alphas_cumprod(config: ScheduleConfig) -> Tensor:
    """abar [num_timesteps] in float64: scaled-linear betas, SNR shift; not yet rescaled to zero SNR."""
    steps = torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=torch.float64
    )
    abar = torch.cumprod(1 - steps**2, dim=0)
    return abar / (config.snr_shift + (1 - config.snr_shift) * abar)


def rescale_zero_snr(abar: Tensor) -> Tensor:
    """Shift and stretch sqrt(abar), ordered clean to noisy: its last value becomes 0 and its first stays."""
    a = abar.sqrt()
    return ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """abar of every training timestep, float64 on the CPU; coefficients take the data's dtype and device."""

    config: ScheduleConfig
    alphas_cumprod: Tensor

    @staticmethod
    def from_config(config: ScheduleConfig) -> NoiseSchedule:
        abar = shifted_alphas_cumprod(config)
        return NoiseSchedule(config, rescale_zero_snr(abar) if config.zero_terminal_snr else abar)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def coefficients(self, timesteps_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t), each [B, 1, ...] to multiply `like` with."""
        abar = self.alphas_cumprod[timesteps_B.cpu()].view(-1, *[1] * (like.ndim - 1))
        return abar.sqrt().to(like), (1 - abar).sqrt().to(like)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
        a, s = self.coefficients(timesteps_B, x0)
        return a * x0 + s * noise

    def velocity(self, x0: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
        """The training target."""
        a, s = self.coefficients(timesteps_B, x0)
        return a * noise - s * x0

    def x0_from_velocity(self, x_t: Tensor, v: Tensor, timesteps_B: Tensor) -> Tensor:
        a, s = self.coefficients(timesteps_B, x_t)
        return a * x_t - s * v
