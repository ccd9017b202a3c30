"""Frames that a video begins with: one image, or the first frames of a video that is to be continued.

They become tokens that no stage changes. Those that fall on key frames are the prefix of stage 1; others,
where they come closer together than key frames, are what interpolation would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cogvideo_ar.config import CogVideoConfig
from cogvideo_ar.options import PIXELS_PER_TOKEN, Plan, key_rate, nearest
from shared.errors import SettingError
from shared.protocol import GenerationRequest
from shared.transforms import resize, resize_crop
from shared.video import Video

FitSize = Literal["refuse", "crop", "resize"]  # crop: cover and cut out the middle; resize: stretch
Translate = Callable[[str], str]
RATE_TOLERANCE = 0.01  # relative: files round their rate


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a pipeline has besides prompts: frames that every video begins with, unless its request has an
    image; what happens to frames of another size; and what turns a prompt into the model's language."""

    frames: Video | None = None
    fit_size: FitSize = "refuse"
    translate: Translate | None = None

    def __post_init__(self) -> None:
        legal = get_args(FitSize)
        if self.fit_size not in legal:
            raise SettingError(f"unknown fit_size {self.fit_size!r}; legal: {', '.join(legal)}")


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Given frames, uint8 [K, H, W, 3] of the model's size, `stride` frames of the finished video apart; the
    first `num_keys` key frames are among them. None of all is no prefix."""

    frames: Tensor | None = None
    stride: int = 1
    num_keys: int = 0


def prefix_of(config: CogVideoConfig, plan: Plan, request: GenerationRequest, given: Given) -> Prefix:
    """What the video of a request begins with. SettingError for frames that do not fit, with legal values."""
    if request.video is not None:
        raise SettingError(
            "CogVideo cannot make a video over (v2v); legal tasks: t2v, i2v, and going on from given frames "
            "(`continuing`, --image_or_video_path)"
        )
    if request.image is not None:
        image = request.image[None]
        return Prefix(frames=fitted(config, image, given.fit_size), stride=plan.key_distance, num_keys=1)
    if given.frames is None:
        return Prefix()
    return place(config, plan, given.frames, given.fit_size)


def place(config: CogVideoConfig, plan: Plan, video: Video, fit_size: FitSize = "refuse") -> Prefix:
    """The frames of `video` at the beginning of the planned one. They come at the rate of the key frames or
    of any round of interpolation, and end on a key frame."""
    stride = _stride(config, plan, video)
    gaps, per_key = video.num_frames - 1, plan.key_distance // stride
    last = plan.num_frames - 1 - (stride == 1)  # a frame must be left to be made
    if gaps % per_key or gaps * stride > last:
        legal = [1 + number for number in range(0, last // stride + 1, per_key)]
        raise SettingError(
            f"{video.num_frames} given frames do not end on a key frame of the {plan.num_frames} frames to "
            f"come; legal: {', '.join(map(str, legal))}; nearest: {nearest(video.num_frames, legal)} "
            "(--given_frames takes the first ones)"
        )
    frames = fitted(config, video.frames, fit_size)
    return Prefix(frames=frames, stride=stride, num_keys=gaps // per_key + 1)


def _stride(config: CogVideoConfig, plan: Plan, video: Video) -> int:
    """How far apart the frames are in the finished video; a single one is a key frame."""
    if video.num_frames == 1:
        return plan.key_distance
    slowest = key_rate(config, plan.sampling.keyframe_duration)
    rates = [slowest * (1 << number) for number in range(plan.num_rounds + 1)]
    for number, rate in enumerate(rates):
        if abs(video.fps - rate) <= RATE_TOLERANCE * rate:
            return plan.key_distance >> number
    listed = ", ".join(f"{rate:g}" for rate in rates)
    raise SettingError(
        f"the given frames come {video.fps:g} a second; legal: {listed} (key frames, and every round of "
        f"interpolation); nearest: {nearest(video.fps, rates):g}"
    )


def fitted(config: CogVideoConfig, frames: Tensor, fit_size: FitSize) -> Tensor:
    """Frames uint8 [K, H, W, 3] of the size of the model's small frames."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise SettingError(f"given frames must be uint8 [H, W, 3], got {frames.dtype} {[*frames.shape[1:]]}")
    height, width = (side * PIXELS_PER_TOKEN for side in config.keyframes.grid)
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    if fit_size == "refuse":
        raise SettingError(
            f"the given frames have {frames.shape[1]} x {frames.shape[2]} pixels (height x width); legal: "
            f"{height} x {width}, or fit_size crop or resize"
        )
    to_size = resize_crop if fit_size == "crop" else resize
    moved = to_size(frames.permute(0, 3, 1, 2), height, width)  # [K, H, W, C] -> [K, C, H, W]
    return moved.permute(0, 2, 3, 1).contiguous()  # -> [K, H, W, C]


def known_tokens(prefixes: Sequence[Prefix], codes: Sequence[Tensor], plan: Plan, frame_len: int) -> Tensor:
    """Tokens of the given frames where they stand in the finished videos, and -1 elsewhere: int64 [B, M, S];
    `codes` [K, h, w] per video, nothing for one without a prefix."""
    known_BMS = torch.full((len(prefixes), plan.num_frames, frame_len), -1, dtype=torch.long)
    for known_MS, prefix, codes_Khw in zip(known_BMS, prefixes, codes, strict=True):
        places = torch.arange(len(codes_Khw)) * prefix.stride
        known_MS[places] = codes_Khw.flatten(1)
    return known_BMS
