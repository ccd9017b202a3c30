"""What a caller may choose about a video, and what follows from it: frames, rate, size and sampling.

Nothing here needs weights, so that an illegal wish is refused before they are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from cogvideo_ar.config import CogLMConfig, CogVideoConfig, SamplingConfig
from shared.errors import SettingError

Number = TypeVar("Number", int, float)
PIXELS_PER_TOKEN = 8  # along each axis of a frame


@dataclass(frozen=True, kw_only=True)
class Options:
    """Wishes; None leaves a choice to the model's own settings.

    `duration` is the time in seconds that the key frames span, the frame-rate token of their prompt. Every
    one of the `rounds` of interpolation puts a frame between any two, so `num_frames` says the same. `fps`
    is how fast the frames are to be shown; by default as fast as the duration says. `temperature`, `top_k`
    and `coglm_temperature2` are for all but the first frame and super-resolution (as upstream). A model with
    super-resolution makes large frames; the size of its small ones leaves that stage out.
    """

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    duration: float | None = None
    rounds: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    coglm_temperature2: float | None = None
    guidance_alpha: float | None = None

    def merged(self, other: Options) -> Options:
        """These wishes, with those of `other` before them."""
        return replace(self, **other.given())

    def given(self) -> dict[str, Any]:
        """The wishes that are not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be made; `sampling` holds the durations of this video's rounds."""

    num_frames: int
    height: int
    width: int
    fps: float
    sampling: SamplingConfig
    fine_draw: CogLMConfig | None  # how super-resolution draws; None: the frames stay small


def resolve(config: CogVideoConfig, options: Options) -> Plan:
    """The plan that `options` stand for with this model. SettingError names what is legal and the nearest."""
    for name, value in options.given().items():
        if not math.isfinite(value):
            raise SettingError(f"{name} must be a finite number, got {value}")
    duration = _duration(config.sampling, options.duration)
    durations = round_durations(config.sampling, duration)
    rounds = _rounds(config, options, durations)
    num_frames = frame_count(config, rounds)
    height, width, fine_draw = _size(config, options)
    if options.fps is not None and options.fps <= 0:
        raise SettingError(f"fps must be positive, got {options.fps}")
    return Plan(
        num_frames=num_frames,
        height=height,
        width=width,
        fps=(num_frames - 1) / duration if options.fps is None else float(options.fps),
        sampling=_sampling(config.sampling, options, duration, durations[:rounds]),
        fine_draw=fine_draw,
    )


def known_durations(sampling: SamplingConfig) -> tuple[float, ...]:
    """The frame-rate tokens that the model knows, longest first."""
    return tuple(sorted({sampling.keyframe_duration, *sampling.interpolation_durations}, reverse=True))


def round_durations(sampling: SamplingConfig, duration: float) -> tuple[float, ...]:
    """Durations of all rounds after key frames that span `duration`: halved down to the smallest known."""
    if duration == sampling.keyframe_duration:
        return sampling.interpolation_durations
    smallest = known_durations(sampling)[-1]
    rounds = int(math.log2(duration / smallest) + 1e-9)
    return tuple(duration / 2**number for number in range(1, rounds + 1))


def frame_count(config: CogVideoConfig, rounds: int) -> int:
    """Frames after so many rounds: 5, 9, 17, 33."""
    return ((config.keyframes.num_frames - 1) << rounds) + 1


def _duration(sampling: SamplingConfig, wanted: float | None) -> float:
    if wanted is None:
        return sampling.keyframe_duration
    return _one_of("duration", float(wanted), known_durations(sampling))


def _rounds(config: CogVideoConfig, options: Options, durations: tuple[float, ...]) -> int:
    legal = range(len(durations) + 1)
    rounds = len(durations)
    if options.rounds is not None:
        rounds = _one_of("rounds", options.rounds, legal)
    if options.num_frames is None:
        return rounds
    counts = [frame_count(config, number) for number in legal]
    why = " (key frames, then one frame between any two in every round)"
    by_count = counts.index(_one_of("num_frames", options.num_frames, counts, why))
    if options.rounds is not None and by_count != rounds:
        raise SettingError(f"{rounds} rounds make {counts[rounds]} frames, not {options.num_frames}")
    return by_count


def _size(config: CogVideoConfig, options: Options) -> tuple[int, int, CogLMConfig | None]:
    """(height, width, how the fine tokens are drawn): the largest frames of the wanted size."""
    sizes: list[tuple[int, int, CogLMConfig | None]] = [(*_pixels(config.keyframes.grid), None)]
    if config.super_resolution is not None:
        fine = config.super_resolution
        sizes.append((*_pixels(fine.fine_grid), fine.draw))
    if options.height is not None:
        height = _one_of("height", options.height, [size[0] for size in sizes])
        sizes = [size for size in sizes if size[0] == height]
    if options.width is not None:
        width = _one_of("width", options.width, [size[1] for size in sizes])
        sizes = [size for size in sizes if size[1] == width]
    return sizes[-1]


def _pixels(grid: tuple[int, int]) -> tuple[int, int]:
    return grid[0] * PIXELS_PER_TOKEN, grid[1] * PIXELS_PER_TOKEN


def _sampling(
    sampling: SamplingConfig, options: Options, duration: float, durations: tuple[float, ...]
) -> SamplingConfig:
    draws = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "temperature2": options.coglm_temperature2,
    }
    alpha = sampling.guidance_alpha if options.guidance_alpha is None else float(options.guidance_alpha)
    if alpha < 0:
        raise SettingError(f"guidance_alpha must be >= 0 (1 is no guidance), got {alpha}")
    try:
        default = replace(sampling.default, **{name: x for name, x in draws.items() if x is not None})
    except ValueError as error:
        raise SettingError(str(error).replace("temperature2", "coglm_temperature2")) from error
    return replace(
        sampling,
        default=default,
        guidance_alpha=alpha,
        keyframe_duration=duration,
        interpolation_durations=durations,
    )


def _one_of(name: str, got: Number, legal: Sequence[Number], why: str = "") -> Number:
    if got in legal:
        return got
    near = min(legal, key=lambda value: abs(value - got))
    listed = ", ".join(str(value) for value in legal)
    raise SettingError(f"{name} {got} is not possible; legal: {listed}{why}; nearest: {near}")
