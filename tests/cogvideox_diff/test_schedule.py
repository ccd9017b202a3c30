"""Noise levels, and the identities between x0, noise and v."""

from __future__ import annotations

import math

import pytest
import torch

from cogvideox_diff.config import SamplingConfig, ScheduleConfig
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import DDIMScheduler, DPMScheduler, first_step, make_levels, make_scheduler


def schedule_with(**settings: float | bool) -> NoiseSchedule:
    return NoiseSchedule.from_config(ScheduleConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("shift", "first"), [(1.0, 0.99957), (3.0, 0.99873)])
def test_ends_of_the_table(shift: float, first: float) -> None:
    a = schedule_with(snr_shift=shift).alphas_cumprod.sqrt()
    assert a[-1] == 0
    assert a[0].item() == pytest.approx(first, abs=1e-5)
    assert (a.diff() < 0).all()


def test_shift_lowers_log_snr_everywhere_alike() -> None:
    one, three = (schedule_with(snr_shift=s, zero_terminal_snr=False).alphas_cumprod for s in (1.0, 3.0))
    drop = (one / (1 - one)).log() - (three / (1 - three)).log()
    torch.testing.assert_close(drop, torch.full_like(drop, math.log(3)))


def test_identities() -> None:
    schedule = schedule_with()
    x0, noise, timesteps = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor([0, 500, 999])
    x_t = schedule.add_noise(x0, noise, timesteps)
    v = schedule.velocity(x0, noise, timesteps)
    torch.testing.assert_close(schedule.x0_from_velocity(x_t, v, timesteps), x0)
    assert torch.equal(x_t[2], noise[2])  # zero terminal SNR
    assert torch.equal(v[2], -x0[2])


def test_coefficients_follow_the_data() -> None:
    schedule = schedule_with()
    x_t = schedule.add_noise(torch.ones(1, 2).bfloat16(), torch.ones(1, 2).bfloat16(), torch.tensor([3]))
    assert x_t.dtype == torch.bfloat16


def test_quirk_trailing_rounding() -> None:
    counts = {n: len(make_levels(schedule_with(), n, "diffusers").timesteps) for n in (50, 61, 103, 121)}
    assert counts == {50: 50, 61: 62, 103: 104, 121: 122}
    assert len(make_levels(schedule_with(), 61, "sat").timesteps) == 61  # the other rules do not have it


def test_quirk_previous_timestep() -> None:
    """51 steps: the last one does not end at the clean level; 50 steps do."""
    levels = make_levels(schedule_with(), 51, "diffusers")
    assert levels.timesteps[-1] == 19
    assert levels.abar_next[-1] == schedule_with().alphas_cumprod[0].item()
    assert levels.abar_next[0] != levels.abar[1]
    assert make_levels(schedule_with(), 50, "diffusers").abar_next[-1] == 1


def test_quirk_sat_sampler_levels() -> None:
    """Zero SNR on the chosen levels: the last keeps its unscaled value, and x0 uses another table entry."""
    levels = make_levels(schedule_with(), 5, "sat")
    unscaled = schedule_with(zero_terminal_snr=False).alphas_cumprod
    assert levels.abar[0] == 0
    assert levels.abar[-1] == pytest.approx(unscaled[199].item())
    assert levels.abar_x0[-1] == schedule_with().alphas_cumprod[189].item()
    assert make_levels(schedule_with(), 1, "sat").abar == (0.0,)


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_step_counts_out_of_range(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.1000, got {num_steps}"):
        make_levels(schedule_with(), num_steps, "diffusers")


@pytest.mark.parametrize("rules", ["diffusers", "sat"])
def test_a_perfect_model_is_recovered_at_the_end(rules: str) -> None:
    """With the true x0 at every step both solvers end at it, from pure noise."""
    levels = make_levels(schedule_with(), 10, rules)  # type: ignore[arg-type]
    x0 = torch.randn(1, 2, 3)
    for scheduler in (DDIMScheduler(levels), DPMScheduler(levels)):
        x, state = torch.randn(1, 2, 3), scheduler.init_state()
        for i in range(len(scheduler.timesteps)):
            x, state = scheduler.step(x, x0, i, state, torch.randn_like)
        torch.testing.assert_close(x, x0)


def test_dpm_keeps_the_variance() -> None:
    """From x_t with its true x0, the next sample has the mean and the deviation of the next level."""
    scheduler = DPMScheduler(make_levels(schedule_with(), 10, "diffusers"))
    x0, i = torch.full((20000,), 2.0), 4
    abar, after = scheduler.levels.abar[i], scheduler.levels.abar_next[i]
    x_t = abar**0.5 * x0 + (1 - abar) ** 0.5 * torch.randn_like(x0)
    x, _ = scheduler.step(x_t, x0, i, None, torch.randn_like)
    assert x.mean().item() == pytest.approx(2 * after**0.5, abs=0.02)
    assert x.std().item() == pytest.approx((1 - after) ** 0.5, abs=0.02)


def test_quirk_dpm_draws_twice() -> None:
    """One draw at the first step, two at later ones (the second counts), none at the clean end."""
    scheduler = DPMScheduler(make_levels(schedule_with(), 4, "diffusers"))
    draws: list[int] = []

    def draw(like: torch.Tensor) -> torch.Tensor:
        draws.append(len(draws))
        return torch.full_like(like, draws[-1])

    x, state, counts = torch.zeros(1, 1), scheduler.init_state(), []
    for i in range(4):
        before = len(draws)
        x, state = scheduler.step(x, torch.zeros(1, 1), i, state, draw)
        counts.append(len(draws) - before)
        if i == 1:
            used = x
    assert counts == [1, 2, 2, 0]
    fresh, _ = scheduler.step(
        torch.zeros(1, 1), torch.zeros(1, 1), 1, None, lambda like: torch.full_like(like, 2)
    )
    kept = scheduler._advance(torch.zeros(1, 1), torch.zeros(1, 1), 1)
    assert kept.item() == 0
    assert used.item() == pytest.approx(fresh.item())


def test_make_scheduler_and_first_step() -> None:
    scheduler = make_scheduler(schedule_with(), SamplingConfig(num_inference_steps=20, scheduler="dpm"))
    assert isinstance(scheduler, DPMScheduler)
    assert len(scheduler.timesteps) == 20
    assert [first_step(50, strength) for strength in (1.0, 0.8, 0.02)] == [0, 10, 49]
    with pytest.raises(ValueError, match=r"strength 0\.01 keeps none of 50"):
        first_step(50, 0.01)
