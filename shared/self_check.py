"""A look at a finished video: is there a picture at all?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.video import Video

DARK, BRIGHT = 12, 243  # a video whose every value lies below the one or above the other shows nothing
FLAT = 3  # levels between a frame's darkest and brightest value, of every channel, that still are one colour
STILL = 2  # levels by which frames may differ and still be the same
CLIPPED_FAILS = 0.998  # share of values at the very end of their range


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`failures` say that the video is worthless; `warnings` what may be meant so."""

    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return "failed" if self.failures else "warning" if self.warnings else "ok"


def check_video(video: Video) -> Verdict:
    """Black, white, one flat colour or clipped all over fails; a still picture only warns, since the prompt
    may ask for one."""
    frames = video.frames
    low, high = frames.amin((1, 2)).int(), frames.amax((1, 2)).int()  # [T, C]
    failures = []
    if int(high.max()) < DARK:
        failures.append("black")
    elif int(low.min()) > BRIGHT:
        failures.append("white")
    elif int((high - low).max()) < FLAT:
        failures.append("one flat colour in every frame")
    elif float(((frames == 0) | (frames == 255)).float().mean()) > CLIPPED_FAILS:
        failures.append("saturated: every value is at an end of its range")
    change = (frames[1:].to(torch.int16) - frames[:1].to(torch.int16)).abs()
    frozen = video.num_frames > 1 and int(change.max()) <= STILL
    return Verdict(failures=tuple(failures), warnings=("frozen: all frames are the same",) if frozen else ())
