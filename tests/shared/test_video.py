"""The video type."""

from __future__ import annotations

import pytest
import torch

from shared.video import Video


def frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_sizes_and_duration():
    video = Video(frames=frames(9, 4, 6, 3), fps=8)
    assert (video.num_frames, video.height, video.width, video.seconds) == (9, 4, 6, 9 / 8)


def test_pixels_come_back_exactly_and_channels_come_first():
    video = Video(frames=frames(9, 4, 6, 3), fps=8)
    pixels = video.to_pixels()
    assert pixels.shape == (3, 9, 4, 6) and pixels.dtype == torch.float32
    assert pixels[1, 2, 3, 4] == video.frames[2, 3, 4, 1].float() / 127.5 - 1
    assert Video.from_pixels(pixels, fps=8).frames.equal(video.frames)


def test_pixels_are_clamped_and_rounded_not_truncated():
    pixels = torch.full((3, 1, 1, 2), 0.999)
    pixels[..., 1] = 7.0
    assert Video.from_pixels(pixels.bfloat16(), fps=8).frames.unique().tolist() == [255]


@pytest.mark.parametrize(
    "bad",
    [frames(9, 4, 6, 4), frames(4, 6, 3), frames(0, 4, 6, 3), frames(9, 4, 6, 3).float()],
)
def test_other_frames_are_refused(bad):
    with pytest.raises(ValueError, match=r"frames must be uint8 \[T, H, W, 3\], got"):
        Video(frames=bad, fps=8)


@pytest.mark.parametrize("fps", [0, -1, float("nan")])
def test_fps_must_be_positive(fps):
    with pytest.raises(ValueError, match="fps must be positive"):
        Video(frames=frames(1, 2, 2, 3), fps=fps)


def test_save_returns_the_path(tmp_path):
    assert Video(frames=frames(2, 4, 6, 3), fps=8).save(tmp_path / "a.mkv") == tmp_path / "a.mkv"
