"""Noise levels against the recorded SAT tables and against diffusers live."""

from __future__ import annotations

import re

import pytest
import torch

from cogvideox_diff.config import ScheduleConfig
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import make_levels
from tests.figures import record_figure
from tests.parity.recorded import case_folder, read_tensors

TABLES = read_tensors(case_folder("cogvideox") / "schedules.safetensors")
TRAIN = sorted(key for key in TABLES if key.startswith("train."))
SAMPLE = sorted(key for key in TABLES if key.endswith(".sqrt_alpha_bar"))


def schedule_of(key: str) -> NoiseSchedule:
    found = re.search(r"shift([\d.]*\d)", key)
    assert found is not None, key
    return NoiseSchedule.from_config(ScheduleConfig(snr_shift=float(found[1])))


@pytest.mark.parity
@pytest.mark.parametrize("key", TRAIN)
def test_training_table(key: str) -> None:
    got = schedule_of(key).alphas_cumprod.sqrt()
    assert got.dtype == torch.float64
    assert (got - TABLES[key].double()).abs().max() < 1e-6


@pytest.mark.parity
@pytest.mark.parametrize("key", SAMPLE)
def test_sat_sampler_levels(key: str) -> None:
    schedule = schedule_of(key)
    found = re.search(r"\.n(\d+)\.", key)
    assert found is not None
    levels = make_levels(schedule, int(found[1]), "sat")
    assert list(levels.timesteps) == TABLES[f"sample.n{found[1]}.timesteps"].tolist()
    assert (torch.tensor(levels.abar).sqrt() - TABLES[key]).abs().max() < 1e-6
    indices = TABLES[key.replace("sqrt_alpha_bar", "quantised_index")]
    assert list(levels.abar_x0) == schedule.alphas_cumprod[indices].tolist()
    assert levels.abar_next == (*levels.abar[1:], 1.0)


@pytest.mark.parity
def test_tables_were_read() -> None:
    assert TRAIN
    assert SAMPLE


@pytest.mark.peers
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_table_and_timesteps(shift: float) -> None:
    """Every step count from 1 to 1000, those with one entry too many included."""
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.CogVideoXDPMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
    )
    schedule = NoiseSchedule.from_config(ScheduleConfig(snr_shift=shift))
    error = (peer.alphas_cumprod.double() - schedule.alphas_cumprod).abs().max().item()
    print(f"shift {shift}: {error:.1e}")
    record_figure(f"noise levels, SNR shift {shift:g}", error, 1e-6)
    assert error < 1e-6
    for num_steps in range(1, 1001):
        peer.set_timesteps(num_steps)
        assert peer.timesteps.tolist() == list(make_levels(schedule, num_steps, "diffusers").timesteps)
