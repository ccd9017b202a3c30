"""Frames of a training clip: what the recorded tables do not show."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_diff.training.frames import finetune_indices, sat_indices
from shared.errors import SettingError


@given(
    st.integers(1, 400), st.sampled_from([8, 16, 24, 25, 29.97, 30, 60]), st.sampled_from([(8, 49), (16, 81)])
)
def test_indices_are_legal_or_refused(num_frames: int, fps: float, target: tuple[int, int]) -> None:
    target_fps, max_frames = target
    got = finetune_indices(num_frames, max_frames=max_frames)
    assert len(got) == max_frames and 0 <= got[0] and got[-1] < num_frames and list(got) == sorted(got)
    try:
        got = sat_indices(num_frames, fps, target_fps=target_fps, max_frames=max_frames)
    except SettingError as error:
        assert "\n" not in str(error)
        return
    assert len(got) == max_frames and got[0] == 3 and got[-1] < num_frames and list(got) == sorted(got)


def test_what_is_refused() -> None:
    with pytest.raises(SettingError, match="need a video of 52, got 50"):
        sat_indices(50, 8, target_fps=8, max_frames=49)
    with pytest.raises(SettingError, match="81 different frames cannot come from the 40"):
        sat_indices(49, 8, target_fps=16, max_frames=81)
    with pytest.raises(SettingError, match="nothing is left of a video of 6 frames"):
        sat_indices(6, 8, target_fps=8, max_frames=49)
    with pytest.raises(SettingError, match="without frames"):
        finetune_indices(0, max_frames=49)


def test_quirk_frame_stride() -> None:
    """25 frames per second for 8: every third, not every 3.125th, so the clip ends before its last second."""
    got = sat_indices(300, 25, target_fps=8, max_frames=49)
    assert {b - a for a, b in pairwise(got)} == {3} and got[-1] == 147
    assert sat_indices(150, 24, target_fps=16, max_frames=81)[:4] == (3, 4, 5, 6)  # at 24 frames per second
