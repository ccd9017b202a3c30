"""Motion and change of videos whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.metrics import METRICS, RefusedError, dynamics
from shared.video import Video


def wave(speed: float, *, frames: int = 16, size: int = 64, fps: float = 8.0) -> Video:
    """A smooth grating that moves `speed` pixels a frame to the right."""
    x = np.arange(size)[None] - speed * np.arange(frames)[:, None]
    row = 127.5 + 100 * np.sin(2 * np.pi * x / 32)
    pixels = np.repeat(np.repeat(row[:, None, :, None], size, axis=1), 3, axis=3)
    return Video(frames=torch.from_numpy(pixels.round().astype(np.uint8)), fps=fps)


def blink(period: int, frames: int = 32) -> Video:
    levels = 100 + 50 * np.cos(2 * np.pi * np.arange(frames) / period)
    pixels = np.broadcast_to(levels.round().astype(np.uint8)[:, None, None, None], (frames, 4, 4, 3))
    return Video(frames=torch.from_numpy(pixels.copy()), fps=8.0)


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_motion_of_a_grating_is_its_speed(speed: float) -> None:
    value = dynamics.measure(wave(speed))["dynamics/motion"]
    assert value == pytest.approx(speed * 8 / 64, rel=0.03)


def test_motion_is_per_second_and_per_frame_height() -> None:
    slow, quick = (dynamics.measure(wave(1.0, fps=fps))["dynamics/motion"] for fps in (8.0, 16.0))
    assert quick == pytest.approx(2 * slow)


def test_frame_difference_by_hand() -> None:
    frames = torch.zeros(4, 4, 4, 3, dtype=torch.uint8)
    frames[1::2] = 30
    assert dynamics.measure(Video(frames=frames, fps=8.0))["dynamics/frame_difference"] == 30.0


def test_fast_power_tells_quick_changes_from_slow() -> None:
    fast, slow = (dynamics.measure(blink(period))["dynamics/fast_power"] for period in (3, 16))
    assert fast > 0.99 and slow < 0.01


def test_the_spectrum_holds_all_power() -> None:
    """Parseval: the two-sided spectrum adds up to the windowed courses' energy."""
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
    power = dynamics.power_spectrum(x)
    both_sides = power[0] + 2 * power[1:-1].sum() + power[-1]
    window = torch.hann_window(12, periodic=False, dtype=torch.float64)
    energy = ((x - x.mean(0)) * window[:, None]).square().sum(0).mean()
    assert float(both_sides) == pytest.approx(12 * float(energy))


def test_a_frozen_video_has_none_of_it() -> None:
    values = dynamics.measure(wave(0.0))
    assert set(values.values()) == {0.0} and not math.isnan(sum(values.values()))
    assert values.keys() == {metric.name for metric in dynamics.METRICS} <= METRICS.keys()


def test_tiny_videos_are_refused() -> None:
    with pytest.raises(RefusedError, match="four frames or more"):
        dynamics.measure(wave(1.0, frames=3))
