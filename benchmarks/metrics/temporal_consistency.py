"""How alike neighbouring frames are, on raw pixels: needs no outside weights, and knows nothing of content.

A frozen or blurred video is very consistent, so higher is not better: read these beside the ground truth's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.metrics.base import Metric, RefusedError
from shared.video import Video

NAME = "temporal_consistency"
MAX_PSNR = 60.0  # identical frames would be infinite; 60 dB is a quarter of one grey level

METRICS = (
    Metric(
        name=NAME,
        title="Temporal consistency",
        recipe="mean cosine between neighbouring frames, all RGB values of a frame as one vector in 0..1",
        better="neither",
        per_frame_step=True,
    ),
    Metric(
        name=f"{NAME}/psnr",
        title="Neighbouring frames",
        recipe="PSNR of each frame against the one before, from the video's mean squared error",
        unit="dB",
        better="neither",
        per_frame_step=True,
        parameters={"max_db": MAX_PSNR},
    ),
    Metric(
        name=f"{NAME}/flicker",
        title="Flicker",
        recipe="mean absolute second difference over time, x[t-1] - 2 x[t] + x[t+1], in grey levels of 255: "
        "zero for pixels that stay or change evenly",
        unit="levels",
        better="neither",
        per_frame_step=True,
    ),
)


def measure(video: Video, prompt: str = "") -> dict[str, float]:
    """The three values of one video; the prompt plays no part. Raises RefusedError under three frames."""
    if video.num_frames < 3:
        raise RefusedError(f"needs three frames or more, got {video.num_frames}")
    frames_TX = video.frames.flatten(1).double()
    return {
        NAME: neighbour_cosine(frames_TX),
        f"{NAME}/psnr": neighbour_psnr(frames_TX),
        f"{NAME}/flicker": flicker(frames_TX),
    }


def neighbour_cosine(frames_TX: Tensor) -> float:
    """Mean cosine of neighbouring rows; two black frames count as alike, a black and a lit one as unlike."""
    norms_T = frames_TX.norm(dim=1)
    dots = (frames_TX[1:] * frames_TX[:-1]).sum(1)
    sizes = norms_T[1:] * norms_T[:-1]
    both_black = (norms_T[1:] == 0) & (norms_T[:-1] == 0)
    cosine = torch.where(sizes > 0, dots / sizes.clamp(min=1e-12), both_black.double())
    return float(cosine.clamp(0, 1).mean())


def neighbour_psnr(frames_TX: Tensor) -> float:
    error = float(((frames_TX[1:] - frames_TX[:-1]) / 255).square().mean())
    return MAX_PSNR if error <= 10 ** (-MAX_PSNR / 10) else -10 * float(torch.tensor(error).log10())


def flicker(frames_TX: Tensor) -> float:
    return float((frames_TX[:-2] - 2 * frames_TX[1:-1] + frames_TX[2:]).abs().mean())
