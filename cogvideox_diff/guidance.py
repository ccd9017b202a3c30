"""Classifier-free guidance on v: one call per step, with a constant or a changing weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideox_diff.config import DynamicMode, SamplingConfig

Predict = Callable[
    [Tensor, int], tuple[Tensor, Tensor | None]
]  # (x, t) -> v with the prompt, v without or None


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """The model with its conditions bound: (x [B, T, C, H, W], timestep) -> (v, unconditional v or None).

    Both halves see the same image latents. `batched`: one model call for both, else two in turn.
    """

    model: Callable[..., Tensor]
    text: Tensor  # [B, L, D]
    negative: Tensor | None = None  # None: no guidance
    image_latents: Tensor | None = None
    ofs: float | None = None
    batched: bool = True

    def __call__(self, x_BTCHW: Tensor, timestep: int) -> tuple[Tensor, Tensor | None]:
        x_BTCHW = x_BTCHW.to(self.text.dtype)
        if self.image_latents is not None:
            x_BTCHW = torch.cat([x_BTCHW, self.image_latents.to(x_BTCHW)], dim=2)
        if self.negative is None:
            return self._run(x_BTCHW, self.text, timestep), None
        if not self.batched:
            return self._run(x_BTCHW, self.text, timestep), self._run(x_BTCHW, self.negative, timestep)
        texts = torch.cat([self.negative, self.text])
        without, with_prompt = self._run(torch.cat([x_BTCHW, x_BTCHW]), texts, timestep).chunk(2)
        return with_prompt, without

    def _run(self, x_BTCHW: Tensor, text: Tensor, timestep: int) -> Tensor:
        one = torch.full((1,), timestep, device=x_BTCHW.device)
        ofs = None if self.ofs is None else torch.full_like(one, self.ofs, dtype=torch.float32)
        return self.model(x_BTCHW, text, one.expand(len(x_BTCHW)), ofs)


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance:
    """u + g (c - u) in float32 with a constant g. Called as guide(predict, x, timestep, step index)."""

    scale: float = 6.0

    def weight(self, timestep: int, i: int) -> float:
        return self.scale

    def __call__(self, predict: Predict, x: Tensor, timestep: int, i: int) -> Tensor:
        v, unconditional = predict(x, timestep)
        if unconditional is None:
            return v.float()
        return unconditional.float() + self.weight(timestep, i) * (v.float() - unconditional.float())


@dataclass(frozen=True, kw_only=True)
class DynamicGuidance(ClassifierFreeGuidance):
    """g = 1 + G (1 - cos(pi u^5)) / 2; u comes from the timestep ("upstream") or the step index (the others).

    `num_steps` is the number of steps run; in video-to-video the shortened count.
    """

    num_steps: int
    mode: DynamicMode = "upstream"

    def __post_init__(self) -> None:
        if self.mode not in ("upstream", "rise", "fall"):
            raise ValueError(
                f'unknown mode {self.mode!r} of dynamic guidance; legal: "upstream", "rise", "fall"'
            )

    def weight(self, timestep: int, i: int) -> float:
        match self.mode:
            case "rise":
                u = (i + 1) / self.num_steps
            case "fall":
                u = (self.num_steps - i) / self.num_steps
            case _:
                # Quirk(dynamic_cfg_timestep_units): u mixes the count of steps with the timestep 0..999, so g
                # jumps about in 1 .. 1 + G until the timestep falls below twice the number of steps
                u = (self.num_steps - timestep) / self.num_steps
        return 1 + self.scale * (1 - math.cos(math.pi * u**5)) / 2


def make_guidance(config: SamplingConfig, num_steps: int) -> ClassifierFreeGuidance:
    """The guidance that `config` names, for `num_steps` steps to run."""
    if config.dynamic_cfg is False:
        return ClassifierFreeGuidance(scale=config.guidance_scale)
    return DynamicGuidance(scale=config.guidance_scale, num_steps=num_steps, mode=config.dynamic_cfg)
