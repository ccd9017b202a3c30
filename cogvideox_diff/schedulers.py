"""DDIM and the second-order SDE solver of CogVideoX, with one step signature and carried state.

A sampler walks down a list of noise levels abar (0: pure noise, 1: clean). Upstream: diffusers' CogVideoX
schedulers; SAT `sgm/modules/diffusionmodules/sampling.py` (VideoDDIMSampler, VPSDEDPMPP2MSampler).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cogvideox_diff.config import SamplerRules, SamplingConfig
from cogvideox_diff.schedule import NoiseSchedule, rescale_zero_snr, shifted_alphas_cumprod

Draw = Callable[[Tensor], Tensor]  # standard normal noise of the given tensor's shape
State = Tensor | None


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Float32 noise [B, *shape], one CPU generator per sample: its noise does not depend on its batch."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def draw_from(generators: Sequence[torch.Generator]) -> Draw:
    """`draw_noise` as the callable that `step` takes; moved to the device of what it is added to."""
    return lambda like: draw_noise(like.shape[1:], generators).to(like.device)


# ---- levels


@dataclass(frozen=True, kw_only=True)
class Levels:
    """One entry per step: the timestep given to the model, the level before and after the step, and the level
    whose coefficients turn v into x0."""

    timesteps: tuple[int, ...]
    abar: tuple[float, ...]
    abar_next: tuple[float, ...]
    abar_x0: tuple[float, ...]


def make_levels(schedule: NoiseSchedule, num_steps: int, rules: SamplerRules) -> Levels:
    """The levels of `num_steps` steps by diffusers' or by the SAT samplers' rules."""
    if not 1 <= num_steps <= schedule.num_timesteps:
        raise ValueError(f"steps must be in 1..{schedule.num_timesteps}, got {num_steps}")
    match rules:
        case "diffusers":
            return _diffusers_levels(schedule, num_steps)
        case "sat":
            return _sat_levels(schedule, num_steps)
        case _:
            raise ValueError(f'unknown sampler rules {rules!r}; legal: "diffusers", "sat"')


def _diffusers_levels(schedule: NoiseSchedule, num_steps: int) -> Levels:
    total = schedule.num_timesteps
    # Quirk(trailing_rounding): for some counts (61, 103, 121, ...) this list has one entry too many
    timesteps = (np.round(np.arange(total, 0, -total / num_steps)).astype(int) - 1).tolist()
    # Quirk(previous_timestep): the level after a step is that of t - total // N, not of the list's next entry
    after = [t - total // num_steps for t in timesteps]
    table = schedule.alphas_cumprod.tolist()
    abar = tuple(table[t] for t in timesteps)
    abar_next = tuple(table[t] if t >= 0 else 1.0 for t in after)
    return Levels(timesteps=tuple(timesteps), abar=abar, abar_next=abar_next, abar_x0=abar)


def _sat_levels(schedule: NoiseSchedule, num_steps: int) -> Levels:
    # Quirk(sat_sampler_levels): zero SNR is imposed on the chosen levels only, so the least noisy one keeps
    # its value; x0 takes its coefficients from the training table's entry nearest to the level.
    total = schedule.num_timesteps
    timesteps = np.floor(np.linspace(total - 1, 0, num_steps, endpoint=False)).astype(int)
    chosen = shifted_alphas_cumprod(schedule.config)[torch.from_numpy(timesteps[::-1].copy())]
    if schedule.config.zero_terminal_snr and num_steps > 1:
        chosen = rescale_zero_snr(chosen)
    elif schedule.config.zero_terminal_snr:
        chosen = torch.zeros_like(chosen)
    chosen = chosen.flip(0)
    table = schedule.alphas_cumprod
    nearest = (table.sqrt()[:, None] - chosen.sqrt()[None]).abs().argmin(dim=0)
    abar = tuple(chosen.tolist())
    return Levels(
        timesteps=tuple(timesteps.tolist()),
        abar=abar,
        abar_next=(*abar[1:], 1.0),
        abar_x0=tuple(table[nearest].tolist()),
    )


# ---- solvers


class Scheduler(Protocol):
    """A solver over fixed levels. `i` is the index of the step; state goes in and comes out."""

    levels: Levels

    @property
    def timesteps(self) -> tuple[int, ...]: ...

    def init_state(self) -> State: ...

    def to_x0(self, x: Tensor, v: Tensor, i: int) -> Tensor: ...

    def step(self, x: Tensor, x0: Tensor, i: int, state: State, draw: Draw) -> tuple[Tensor, State]: ...


class _Solver:
    def __init__(self, levels: Levels) -> None:
        self.levels = levels

    @property
    def timesteps(self) -> tuple[int, ...]:
        return self.levels.timesteps

    def init_state(self) -> State:
        return None

    def to_x0(self, x: Tensor, v: Tensor, i: int) -> Tensor:
        """Estimate of the clean sample in float32 from the sample and the model's v."""
        abar = self.levels.abar_x0[i]
        return abar**0.5 * x.float() - (1 - abar) ** 0.5 * v.float()


class DDIMScheduler(_Solver):
    """Deterministic, first order: the sample keeps its noise and is moved to the next level."""

    def step(self, x: Tensor, x0: Tensor, i: int, state: State, draw: Draw) -> tuple[Tensor, State]:
        """`x` and `x0` of step `i` -> (sample at the next level in the dtype of `x`, state)."""
        abar, after = self.levels.abar[i], self.levels.abar_next[i]
        kept = ((1 - after) / (1 - abar)) ** 0.5
        x_next = kept * x.float() + (after**0.5 - abar**0.5 * kept) * x0
        return x_next.to(x.dtype), state

    def unstep(self, x_next: Tensor, v: Tensor, i: int) -> Tensor:
        """The sample that step `i` takes to `x_next` where the model says `v` for it: `to_x0` and `step`
        solved for x. ValueError for a single step, which forgets its noise."""
        abar, after, used = self.levels.abar[i], self.levels.abar_next[i], self.levels.abar_x0[i]
        kept = ((1 - after) / (1 - abar)) ** 0.5
        share = after**0.5 - abar**0.5 * kept  # of x0 in x_next
        if (of_x := kept + share * used**0.5) < 1e-6:
            raise ValueError("a single step from noise to the clean sample has no inverse; take two or more")
        return (x_next + share * (1 - used) ** 0.5 * v) / of_x


class DPMScheduler(_Solver):
    """Stochastic, second order (DPM-Solver++ 2M SDE) in lambda = ln(sqrt(abar) / sqrt(1 - abar))."""

    def step(self, x: Tensor, x0: Tensor, i: int, state: State, draw: Draw) -> tuple[Tensor, State]:
        """As in DDIM; the state is the last step's x0, None before the first step."""
        after = self.levels.abar_next[i]
        if after == 1:
            return x0.to(x.dtype), x0
        noise = draw(x)
        if state is not None:
            # Quirk(dpm_draws_twice): upstream makes the first-order result first and throws it away
            noise = draw(x)
        x_next = self._advance(x.float(), self._extrapolate(x0, i, state), i) + self._noise_scale(i) * noise
        return x_next.to(x.dtype), x0

    def _extrapolate(self, x0: Tensor, i: int, last_x0: Tensor | None) -> Tensor:
        """x0 continued along the change since the last step; r is infinite after a start from pure noise."""
        if last_x0 is None:
            return x0
        r = (_lambda(self.levels.abar[i]) - _lambda(self.levels.abar[i - 1])) / self._step_size(i)
        return (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last_x0

    def _advance(self, x: Tensor, x0: Tensor, i: int) -> Tensor:
        abar, after, h = self.levels.abar[i], self.levels.abar_next[i], self._step_size(i)
        kept = ((1 - after) / (1 - abar)) ** 0.5 * math.exp(-h)
        return kept * x - after**0.5 * math.expm1(-2 * h) * x0

    def _noise_scale(self, i: int) -> float:
        return (1 - self.levels.abar_next[i]) ** 0.5 * (-math.expm1(-2 * self._step_size(i))) ** 0.5

    def _step_size(self, i: int) -> float:
        return _lambda(self.levels.abar_next[i]) - _lambda(self.levels.abar[i])


def _lambda(abar: float) -> float:
    if abar in (0, 1):
        return math.inf if abar else -math.inf
    return 0.5 * math.log(abar / (1 - abar))


class KnownFrames:
    """A solver in whose samples the first frames are known: at every level they are the clean `known_BTCHW`
    with the same noise, so that the frames behind are made to continue them ("replacement")."""

    def __init__(self, solver: Scheduler, known_BTCHW: Tensor, noise_BTCHW: Tensor) -> None:
        self.solver, self.known = solver, known_BTCHW.float()
        self.noise = noise_BTCHW[:, : known_BTCHW.shape[1]].float()
        self.levels = solver.levels

    @property
    def timesteps(self) -> tuple[int, ...]:
        return self.levels.timesteps

    def init_state(self) -> State:
        return self.solver.init_state()

    def to_x0(self, x: Tensor, v: Tensor, i: int) -> Tensor:
        return self._with_known(self.solver.to_x0(x, v, i), self.known)

    def step(self, x: Tensor, x0: Tensor, i: int, state: State, draw: Draw) -> tuple[Tensor, State]:
        x_next, state = self.solver.step(x, x0, i, state, draw)
        return self.restored(x_next, self.levels.abar_next[i]), state

    def restored(self, x: Tensor, abar: float) -> Tensor:
        """`x` with the known frames at the level `abar`."""
        return self._with_known(x, abar**0.5 * self.known + (1 - abar) ** 0.5 * self.noise)

    def _with_known(self, x: Tensor, known: Tensor) -> Tensor:
        return torch.cat([known.to(x), x[:, known.shape[1] :]], dim=1)


def make_scheduler(schedule: NoiseSchedule, config: SamplingConfig) -> Scheduler:
    """The solver that `config` names, for its number of steps."""
    levels = make_levels(schedule, config.num_inference_steps, config.rules)
    return DDIMScheduler(levels) if config.scheduler == "ddim" else DPMScheduler(levels)


def first_step(num_steps: int, strength: float) -> int:
    """Index of the first step that video-to-video runs: the last int(num_steps * strength) steps are kept."""
    kept = min(int(num_steps * strength), num_steps)
    if kept < 1:
        raise ValueError(f"strength {strength} keeps none of {num_steps} steps")
    return num_steps - kept
