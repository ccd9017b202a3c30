"""Sizes and frame counts: conversions, legal values and the nearest legal value in every error."""

from __future__ import annotations

from typing import Any

import pytest

from cogvideox_diff.config import PRESETS
from cogvideox_diff.geometry import (
    VideoGeometry,
    fit_short_side,
    frames_to_pad,
    latent_frames,
    nearest_frames,
    nearest_multiple,
)
from shared.errors import SettingError

# video tokens of the native sizes, and latent frames with padding
NATIVE = {
    "cogvideox-2b": (17550, 13),
    "cogvideox-5b": (17550, 13),
    "cogvideox-5b-i2v": (17550, 13),
    "cogvideox-1.5-5b": (44880, 22),
    "cogvideox-1.5-5b-i2v": (44880, 22),
}


@pytest.mark.parametrize("preset", NATIVE)
def test_native_sizes(preset: str) -> None:
    geometry = VideoGeometry.of(PRESETS[preset]())
    assert (geometry.num_tokens, geometry.padded_latent_frames) == NATIVE[preset]


def test_conversions() -> None:
    geometry = VideoGeometry.of(PRESETS["cogvideox-1.5-5b"](), height=480, width=640, num_frames=33)
    assert geometry.latent_frames == 9
    assert geometry.frames_to_pad == 1
    assert geometry.latent_shape(16) == (10, 16, 60, 80)
    assert geometry.grid == (5, 30, 40)
    assert geometry.num_tokens == 6000


def test_padding() -> None:
    assert [frames_to_pad(count, 2) for count in (11, 12, 13)] == [1, 0, 1]
    assert [frames_to_pad(count, 3) for count in (9, 10, 11)] == [0, 2, 1]
    assert frames_to_pad(13, 1) == 0


def test_latent_frames() -> None:
    assert [latent_frames(count) for count in (1, 5, 49, 81)] == [1, 2, 13, 21]
    with pytest.raises(SettingError, match=r"4k\+1, got 48; nearest: 49"):
        latent_frames(48)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"num_frames": 50}, r"8N\+1 up to 49, got 50; nearest: 49"),
        ({"num_frames": 37}, r"got 37; nearest: 41"),
        ({"num_frames": 0}, r"got 0; nearest: 1"),
        ({"num_frames": 161}, r"got 161; nearest: 49"),
        ({"height": 470}, r"height must be a multiple of 16, got 470; nearest: 464"),
        ({"width": 712}, r"width must be a multiple of 16, got 712; nearest: 720"),
        ({"width": -5}, r"got -5; nearest: 16"),
    ],
)
def test_errors_name_the_nearest_legal_value(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        VideoGeometry.of(PRESETS["cogvideox-2b"](), **request_)


def test_limits_of_the_position_tables() -> None:
    with pytest.raises(SettingError, match=r"480x720 \(height x width\) only, got 720x480"):
        VideoGeometry.of(PRESETS["cogvideox-5b-i2v"](), height=720, width=480)
    with pytest.raises(SettingError, match="up to 2400, got 2416; nearest: 2400"):
        VideoGeometry.of(PRESETS["cogvideox-1.5-5b"](), width=2416)
    portrait = VideoGeometry.of(PRESETS["cogvideox-1.5-5b"](), height=1360, width=768)
    assert portrait.grid == (11, 85, 48)


def test_nearest_values() -> None:
    assert [nearest_frames(count, 8) for count in (-3, 4, 5, 12, 13)] == [1, 1, 9, 9, 17]
    assert [nearest_multiple(size, 16) for size in (0, 23, 24, 40)] == [16, 16, 32, 48]
    assert nearest_multiple(1000, 16, most=90) == 80


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((480, 720), (768, 1152)),
        ((720, 480), (1152, 768)),
        ((768, 1360), (768, 1360)),
        ((96, 97), (768, 784)),
    ],
)
def test_fit_short_side(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_short_side(*size) == fitted
