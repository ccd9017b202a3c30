"""Sizes and ranges."""

from __future__ import annotations

import pytest
import torch

from shared.transforms import (
    centre_crop,
    cover_size,
    fit_video,
    resize,
    resize_crop,
    to_signed,
)
from shared.video import Video


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (25, 25), (48, 64), (7, 200)])
@pytest.mark.parametrize("wanted", [(16, 16), (24, 40), (40, 24), (60, 90)])
def test_resize_crop_covers_and_never_distorts(size, wanted):
    height, width = cover_size(*size, *wanted)
    assert height >= wanted[0] and width >= wanted[1]
    assert height == wanted[0] or width == wanted[1]
    assert abs(height / size[0] - width / size[1]) <= 1 / min(size)
    assert resize_crop(noise(2, 3, *size), *wanted).shape == (2, 3, *wanted)


def test_the_right_size_stays_as_it_is():
    x = noise(2, 3, 16, 24)
    assert resize_crop(x, 16, 24).equal(x)


def test_downscaling_is_antialiased():
    checker = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    checker[..., ::2, 1::2] = checker[..., 1::2, ::2] = 255
    assert (resize(checker, 16, 16).float() - 127.5).abs().max() < 2


def test_bicubic_overshoot_is_clamped_for_uint8_only():
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    assert resize(edge, 24, 24).max() == 255 and resize(edge, 24, 24).min() == 0
    assert resize(edge.float(), 24, 24).max() > 255


def test_centre_crop_takes_the_middle():
    x = torch.arange(7).repeat(1, 1, 5, 1)
    assert centre_crop(x, 3, 4)[0, 0, 0].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="cannot crop 6x4 out of 5x7"):
        centre_crop(x, 6, 4)


def test_fit_video_keeps_the_rate():
    video = fit_video(Video(frames=noise(3, 20, 30, 3), fps=8), 16, 16)
    assert video.frames.shape == (3, 16, 16, 3) and video.fps == 8


def test_the_ends_of_the_range_are_met():
    assert to_signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
