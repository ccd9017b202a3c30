"""Whole sampling trajectories: the recorded SAT runs step by step, and diffusers live with the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideox_diff.config import SamplingConfig, ScheduleConfig
from cogvideox_diff.denoising import Step, denoise
from cogvideox_diff.guidance import DynamicGuidance, Predictor, make_guidance
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import draw_from, make_scheduler
from tests.figures import record_figure
from tests.parity.cogvideox.tiny_sat import case_names, load_model, load_schedule, read_case, relative_error

RECORDED = {"sde_dpm": "dpm", "ddim": "ddim"}


def replay(draws: Iterator[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda like: next(draws)


@pytest.mark.parity
@pytest.mark.parametrize("recorded", RECORDED)
@pytest.mark.parametrize("name", case_names())
def test_recorded_sat_sampler(name: str, recorded: str) -> None:
    """Timesteps, guidance weights and every state, from the recorded noise draws in their order."""
    case = read_case(name)
    io = {key.removeprefix(f"{recorded}."): x for key, x in case.io.items() if key.startswith(f"{recorded}.")}
    given = case.inputs(slice(0, 1))
    num_steps = case.meta["sampler_steps"]
    config = SamplingConfig(
        num_inference_steps=num_steps,
        guidance_scale=case.meta["guidance_scale"],
        dynamic_cfg="upstream",
        scheduler=RECORDED[recorded],
        rules="sat",
    )
    scheduler = make_scheduler(load_schedule(case), config)
    guide = make_guidance(config, num_steps)
    assert isinstance(guide, DynamicGuidance)
    assert list(scheduler.timesteps) == io["timesteps"].tolist()
    weights = [guide.weight(t, i) for i, t in enumerate(scheduler.timesteps)]
    assert weights == pytest.approx(io["guidance"].tolist(), rel=1e-9)

    predict = Predictor(
        model=load_model(case),
        text=given["text"],
        negative=torch.zeros_like(given["text"]),
        image_latents=given["image_latents"],
        ofs=None if given["ofs"] is None else given["ofs"].item(),
    )
    draws = iter(io.get("noise_draws", ()))
    states: list[Tensor] = []

    def keep(step: Step) -> None:
        states.append(step.x)

    final = denoise(predict, scheduler, io["initial"], guide, replay(draws), callback=keep)
    errors = [relative_error(got, want) for got, want in zip(states, io["states"], strict=True)]
    print(f"{name} {recorded}: " + " ".join(f"{error:.1e}" for error in errors))
    record_figure(f"SAT sampler {recorded}, every state", max(errors), 1e-5)
    assert max(errors) < 1e-5
    assert relative_error(final, io["final"]) < 1e-5
    assert next(draws, None) is None  # every recorded draw was used


# ---- diffusers live

SETTINGS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}


def toy_model(x: Tensor, text: Tensor, timesteps: Tensor, ofs: Tensor | None) -> Tensor:
    """Any smooth function of sample, prompt and time will do."""
    shift = text.mean(dim=(1, 2)) + timesteps / 1000
    return torch.sin(x + shift.view(-1, 1, 1, 1, 1)) - 0.3 * x


def peer_guided(x: Tensor, text: Tensor, negative: Tensor, t: int, scale: float) -> Tensor:
    both = toy_model(torch.cat([x, x]), torch.cat([negative, text]), torch.full((2 * len(x),), t), None)
    without, with_prompt = both.chunk(2)
    return without + scale * (with_prompt - without)


def peer_trajectory(
    peer: Any, x: Tensor, guided: Callable[[Tensor, int], Tensor], seeds: list[int]
) -> Tensor:
    """The pipelines' loop around a diffusers scheduler."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    old_x0, timesteps = None, peer.timesteps
    for i, t in enumerate(timesteps):
        v = guided(x, int(t))
        if "DPM" in type(peer).__name__:
            back = timesteps[i - 1] if i > 0 else None
            x, old_x0 = peer.step(v, old_x0, t, back, x, generator=generators, return_dict=False)
        else:
            x = peer.step(v, t, x, return_dict=False)[0]
    return x


@pytest.mark.peers
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 30, 50, 51, 61])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_diffusers_trajectory(scheduler: str, num_steps: int, shift: float) -> None:
    """The same generators on both sides; two samples with a generator each."""
    diffusers = pytest.importorskip("diffusers")
    kind = diffusers.CogVideoXDDIMScheduler if scheduler == "ddim" else diffusers.CogVideoXDPMScheduler
    peer = kind(**SETTINGS, snr_shift_scale=shift)
    peer.set_timesteps(num_steps)
    seeds = [3, 4]
    x = torch.randn(2, 3, 4, 6, 5)
    text, negative = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    wanted = peer_trajectory(peer, x, lambda x, t: peer_guided(x, text, negative, t, 6.0), seeds)

    config = SamplingConfig(num_inference_steps=num_steps, scheduler=scheduler)
    got = denoise(
        Predictor(model=toy_model, text=text, negative=negative),
        make_scheduler(NoiseSchedule.from_config(ScheduleConfig(snr_shift=shift)), config),
        x,
        make_guidance(config, num_steps),
        draw_from([torch.Generator().manual_seed(seed) for seed in seeds]),
    )
    error = relative_error(got, wanted)
    print(f"{scheduler} {num_steps} steps, shift {shift}: {error:.1e}")
    record_figure(f"{scheduler} over 1 to 61 steps, SNR shift {shift:g}", error, 1e-4)
    assert error < 1e-4
