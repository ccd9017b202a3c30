"""How much and how fast pixels change, from raw frames: no weights, no optical flow, no warping.

None of these is better when higher: a frozen video has no flicker. Read them beside the ground truth's.
Legend: T frames, H/W rows/columns, X all values of a frame, K frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.metrics.base import Metric, RefusedError
from shared.video import Video

NAME = "dynamics"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
FAST = 0.25  # cycles per frame: half of what the rate can show

METRICS = (
    Metric(
        name=f"{NAME}/frame_difference",
        title="Frame difference",
        recipe="mean absolute difference of neighbouring frames, RGB, in grey levels of 255",
        unit="levels",
        better="neither",
        per_frame_step=True,
    ),
    Metric(
        name=f"{NAME}/fast_power",
        title="Fast temporal power",
        recipe="share of the temporal power spectrum (squared FFT over time of each RGB value, mean removed, "
        "Hann window) at a quarter of a cycle per frame or more; 0 for a frozen video",
        better="neither",
        proportion=True,
        per_frame_step=True,
        parameters={"from_cycles_per_frame": FAST},
    ),
    Metric(
        name=f"{NAME}/motion",
        title="Motion magnitude",
        recipe="normal-flow speed without warping: sum |dI/dt| |grad I| over sum |grad I|^2, luma, central "
        "differences in space and neighbouring frames in time, in frame heights per second",
        unit="heights/s",
        better="neither",
        per_frame_step=True,
        parameters={"luma": list(LUMA)},
    ),
)


def measure(video: Video, prompt: str = "") -> dict[str, float]:
    """The three values of one video; the prompt plays no part. RefusedError where it is too small."""
    if video.num_frames < 4 or min(video.height, video.width) < 3:
        size = f"{video.num_frames} of {video.width}x{video.height}"
        raise RefusedError(f"needs four frames or more of 3x3 pixels or more, got {size}")
    frames_TX = video.frames.flatten(1).double()
    luma_THW = video.frames.double() @ torch.tensor(LUMA, dtype=torch.float64)
    return {
        f"{NAME}/frame_difference": float(frames_TX.diff(dim=0).abs().mean()),
        f"{NAME}/fast_power": fast_power(frames_TX),
        f"{NAME}/motion": normal_flow(luma_THW) * video.fps / video.height,
    }


def power_spectrum(frames_TX: Tensor) -> Tensor:
    """Mean power [K = T // 2 + 1] of the values' courses over time, without their means, Hann-windowed."""
    window_T = torch.hann_window(len(frames_TX), periodic=False, dtype=frames_TX.dtype)
    courses_TX = (frames_TX - frames_TX.mean(0)) * window_T[:, None]
    return torch.fft.rfft(courses_TX, dim=0).abs().square().mean(1)


def fast_power(frames_TX: Tensor) -> float:
    power_K = power_spectrum(frames_TX)[1:]  # without the mean, which the window brings back in part
    frequencies_K = torch.fft.rfftfreq(len(frames_TX), dtype=torch.float64)[1:]
    total = power_K.sum()
    return float(power_K[frequencies_K >= FAST].sum() / total) if total > 0 else 0.0


def normal_flow(luma_THW: Tensor) -> float:
    """Pixels per frame that edges move across themselves; edges count by their strength."""
    middle = (luma_THW[1:] + luma_THW[:-1]) / 2
    across = (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2]) / 2
    down = (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]) / 2
    gradient = torch.hypot(across, down)
    change = luma_THW.diff(dim=0)[:, 1:-1, 1:-1].abs()
    energy = gradient.square().sum()
    return float((change * gradient).sum() / energy) if energy > 0 else 0.0
