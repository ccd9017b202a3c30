"""What a model's codec loses: clips, encoded and decoded. No generator does better than its codec."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.metrics import prompt_accuracy
from benchmarks.metrics.base import Metric, RefusedError
from shared.video import Video

NAME = "reconstruction"
MAX_PSNR = 60.0
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004

METRICS = (
    Metric(
        name=f"{NAME}/psnr",
        title="Codec PSNR",
        recipe="PSNR of decode(encode(clip)) against the clip, RGB in 0..1, from its mean squared error",
        unit="dB",
        parameters={"max_db": MAX_PSNR},
    ),
    Metric(
        name=f"{NAME}/ssim",
        title="Codec SSIM",
        recipe="structural similarity of decode(encode(clip)), Gaussian window 11, sigma 1.5, K 0.01 and "
        "0.03, per RGB channel, valid region, mean over frames",
        parameters={"window": WINDOW, "sigma": SIGMA, "k1": K1, "k2": K2},
    ),
    Metric(
        name=f"{NAME}/lpips",
        title="Codec LPIPS",
        recipe="LPIPS of decode(encode(clip)) against the clip, frames in -1..1 at their own size, mean over "
        "frames, by the file given as `lpips`",
        better="lower",
        needs="lpips",
    ),
    Metric(
        name=f"{NAME}/prompt_accuracy",
        title="Prompt accuracy after the codec",
        recipe="prompt_accuracy of decode(encode(clip)) against the clip's own caption: the ceiling that the "
        "codec sets to the generator",
        proportion=True,
        parameters=prompt_accuracy.BORDERS,
    ),
)


def measure(
    video: Video, truth: Video, prompt: str, lpips: Callable[[Video, Video], float] | None = None
) -> dict[str, float]:
    """Values of one reconstruction. Raises RefusedError where the two differ in shape."""
    if video.frames.shape != truth.frames.shape:
        got, want = list(video.frames.shape), list(truth.frames.shape)
        raise RefusedError(f"the codec returned frames {got} for a clip of {want}")
    first, second = (x.frames.permute(0, 3, 1, 2).double() / 255 for x in (video, truth))  # [T, C, H, W]
    values = {f"{NAME}/psnr": psnr(first, second), f"{NAME}/ssim": ssim(first, second)}
    if lpips is not None:
        values[f"{NAME}/lpips"] = lpips(video, truth)
    accuracy = prompt_accuracy.measure(video, prompt)[prompt_accuracy.NAME]
    return {**values, f"{NAME}/prompt_accuracy": accuracy}


def psnr(first_TCHW: Tensor, second_TCHW: Tensor) -> float:
    """Peak signal to noise in dB for values in 0..1, at most MAX_PSNR."""
    error = (first_TCHW - second_TCHW).square().mean().clamp(min=10 ** (-MAX_PSNR / 10))
    return float(-10 * error.log10())


def ssim(first_TCHW: Tensor, second_TCHW: Tensor) -> float:
    """Mean structural similarity for values in 0..1; RefusedError for frames smaller than the window."""
    if min(first_TCHW.shape[-2:]) < WINDOW:
        raise RefusedError(f"SSIM needs frames of {WINDOW} pixels or more, got {list(first_TCHW.shape[-2:])}")
    x, y = first_TCHW.flatten(0, 1), second_TCHW.flatten(0, 1)  # [T * C, H, W]
    mean_x, mean_y, xx, yy, xy = (_blur(v) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = K1**2, K2**2
    likeness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float((likeness * structure).mean())


def _blur(x_NHW: Tensor) -> Tensor:
    """Gaussian window over the valid region, as a product with a band matrix on either side."""
    height, width = x_NHW.shape[-2:]
    return _band(height, x_NHW.dtype) @ x_NHW @ _band(width, x_NHW.dtype).T


def _band(size: int, dtype: torch.dtype) -> Tensor:
    """[size - WINDOW + 1, size]: row i holds the window's weights from column i on."""
    offsets = torch.arange(size)[None] - torch.arange(size - WINDOW + 1)[:, None] - (WINDOW - 1) / 2
    weights = torch.exp(-(offsets.to(dtype) ** 2) / (2 * SIGMA**2)) * (offsets.abs() <= WINDOW // 2)
    return weights / weights.sum(1, keepdim=True)
