"""Which frames of a clip are looked at."""

from __future__ import annotations

import math
from typing import Literal

from shared.errors import SettingError
from shared.video import Video

FrameChoice = Literal["seconds", "spread"]
MAX_FRAMES = 24  # of an end-to-end captioner; cogvlm2-llama3-caption was trained with as many
SPREAD_SECONDS = 60.0
LEAST_SECONDS = 0.001


def frames_every(num_frames: int, fps: float, seconds: float = 2.0) -> list[tuple[float, int]]:
    """(time, frame) at 0, `seconds`, 2 `seconds`, ...: the frames shown then. Source: CogVideoX section 3.3,
    one dense caption every two seconds."""
    if not seconds >= LEAST_SECONDS:
        raise SettingError(f"every must be at least {LEAST_SECONDS} seconds, got {seconds:g}")
    count = math.ceil(num_frames / fps / seconds - 1e-9)
    # The small addition keeps a frame that begins exactly then, in spite of rounding.
    return [(i * seconds, min(math.floor(i * seconds * fps + 1e-6), num_frames - 1)) for i in range(count)]


def frames_at_seconds(num_frames: int, fps: float, limit: int = MAX_FRAMES) -> list[int]:
    """For every whole second up to the rounded time of the last frame, the frame nearest to it; at most
    `limit`. Source: THUDM/CogVideo, tools/caption, strategy "chat"."""
    last = (num_frames - 1) / fps
    seconds = range(min(math.floor(last + 0.5) + 1, limit))
    return [min(math.ceil(second * fps - 0.5), num_frames - 1) for second in seconds]


def frames_spread(num_frames: int, fps: float, limit: int = MAX_FRAMES) -> list[int]:
    """`limit` frames (or all, if there are fewer) evenly over the first minute, both ends included. Source:
    the same, strategy "base"."""
    count = min(num_frames, max(1, math.floor(SPREAD_SECONDS * fps)))
    chosen = min(limit, count)
    return [round(i * (count - 1) / max(chosen - 1, 1)) for i in range(chosen)]


def choose_frames(video: Video, choice: FrameChoice, limit: int = MAX_FRAMES) -> list[int]:
    choose = frames_at_seconds if choice == "seconds" else frames_spread
    return choose(video.num_frames, video.fps, limit)
