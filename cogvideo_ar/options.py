"""What a caller may choose about a video, and what follows from it: frames, rate, size and sampling.

Nothing here needs weights, so that an illegal wish is refused before they are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from typing import Any, TypeVar

from cogvideo_ar.config import CogLMConfig, CogVideoConfig, SamplingConfig
from shared.errors import SettingError

Choice = TypeVar("Choice", int, float, str)
PIXELS_PER_TOKEN = 8  # along each axis of a frame
MAX_ROUNDS = 8  # of interpolation: every one doubles the number of frames


@dataclass(frozen=True, kw_only=True)
class Options:
    """Wishes; None leaves a choice to the model's own settings.

    `duration` is the time in seconds that as many key frames span as the model was trained with: the
    frame-rate token of their prompt. Other counts, `num_keyframes`, keep that rate. Every one of the `rounds`
    of interpolation puts a frame between any two, so `num_frames` says the same; rounds finer than the
    model's frame-rate tokens repeat the finest. `fps` is how fast the frames are to be shown; by default as
    fast as the duration says. `temperature`, `top_k` and `coglm_temperature2` are for all but the first frame
    and super-resolution (as upstream). `super_resolution` is "none", "direct" (as released; the default of a
    model that has it) or "direct+iterative"; the height or width of the small frames leaves it out too.
    """

    num_frames: int | None = None
    num_keyframes: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    duration: float | None = None
    rounds: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    coglm_temperature2: float | None = None
    guidance_alpha: float | None = None
    super_resolution: str | None = None

    def merged(self, other: Options) -> Options:
        """These wishes, with those of `other` before them."""
        return replace(self, **other.given())

    def given(self) -> dict[str, Any]:
        """The wishes that are not None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be made; `sampling` holds the durations of this video's rounds. `notes` say what the model
    was not made for."""

    num_frames: int
    num_keyframes: int
    height: int
    width: int
    fps: float
    sampling: SamplingConfig
    fine_draw: CogLMConfig | None  # how super-resolution draws; None: the frames stay small
    refinement: tuple[int, ...] = ()  # likeliest tokens that every pass of iterative refinement draws from
    notes: tuple[str, ...] = ()

    @property
    def num_rounds(self) -> int:
        return len(self.sampling.interpolation_durations)

    @property
    def key_distance(self) -> int:
        """From one key frame to the next, in frames of the finished video."""
        return 1 << self.num_rounds


def resolve(config: CogVideoConfig, options: Options) -> Plan:
    """The plan that `options` stand for with this model. SettingError names what is legal and the nearest."""
    for name, value in options.given().items():
        if isinstance(value, int | float) and not math.isfinite(value):
            raise SettingError(f"{name} must be a finite number, got {value}")
    duration = _duration(config.sampling, options.duration)
    num_keyframes = _num_keyframes(config, options)
    known = round_durations(config.sampling, duration)
    step = (config.interpolation.num_frames - 1) // 2  # gaps of a block of given frames
    divides = (num_keyframes - 1) % step == 0
    rounds = _rounds(options, num_keyframes, len(known) if divides else 0)
    if rounds and not divides:
        legal = ", ".join(str(n) for n in range(1 + step, max_keyframes(config) + 1, step))
        raise SettingError(
            f"{num_keyframes} key frames cannot be interpolated; legal: {legal} key frames, or rounds 0"
        )
    num_frames = frame_count(num_keyframes, rounds)
    height, width, fine_draw = _size(config, options)
    if options.fps is not None and options.fps <= 0:
        raise SettingError(f"fps must be positive, got {options.fps}")
    fps = key_rate(config, duration) * (1 << rounds)
    durations = known[:rounds] + (known_durations(config.sampling)[-1],) * (rounds - len(known))
    return Plan(
        num_frames=num_frames,
        num_keyframes=num_keyframes,
        height=height,
        width=width,
        fps=fps if options.fps is None else float(options.fps),
        sampling=_sampling(config.sampling, options, duration, durations),
        fine_draw=fine_draw,
        refinement=_refinement(config, options, fine_draw),
        notes=_notes(config, num_keyframes, rounds, len(known)),
    )


def key_rate(config: CogVideoConfig, duration: float) -> float:
    """Key frames per second where as many as the model was trained with span `duration` seconds."""
    return (config.keyframes.num_frames - 1) / duration


def max_keyframes(config: CogVideoConfig) -> int:
    """Key frames that have position embeddings."""
    return 1 + config.keyframes.num_extra_positions // config.keyframes.frame_len


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


def frame_count(num_keyframes: int, rounds: int) -> int:
    """Frames after so many rounds: 5, 9, 17, 33."""
    return ((num_keyframes - 1) << rounds) + 1


def _duration(sampling: SamplingConfig, wanted: float | None) -> float:
    if wanted is None:
        return sampling.keyframe_duration
    return _one_of("duration", float(wanted), known_durations(sampling))


def _num_keyframes(config: CogVideoConfig, options: Options) -> int:
    if options.num_keyframes is None:
        return config.keyframes.num_frames
    most = max_keyframes(config)
    return _one_of("num_keyframes", options.num_keyframes, range(2, most + 1), " (as positions are learned)")


def _rounds(options: Options, num_keyframes: int, default: int) -> int:
    """Rounds that are asked for, by either of two names."""
    legal = range(MAX_ROUNDS + 1)
    rounds = default
    if options.rounds is not None:
        rounds = _one_of("rounds", options.rounds, legal)
    if options.num_frames is None:
        return rounds
    counts = [frame_count(num_keyframes, number) for number in legal]
    why = " (key frames, then one frame between any two in every round)"
    by_count = counts.index(_one_of("num_frames", options.num_frames, counts, why))
    if options.rounds is not None and by_count != rounds:
        raise SettingError(f"{rounds} rounds make {counts[rounds]} frames, not {options.num_frames}")
    return by_count


def _size(config: CogVideoConfig, options: Options) -> tuple[int, int, CogLMConfig | None]:
    """(height, width, how the fine tokens are drawn): the largest frames of the wanted size."""
    sizes: list[tuple[int, int, CogLMConfig | None]] = [(*_pixels(config.keyframes.grid), None)]
    wanted = None if options.super_resolution is None else _fine_stages(config, options.super_resolution)
    fine = config.super_resolution
    if fine is not None and wanted != "none":
        sizes.append((*_pixels(fine.fine_grid), fine.draw))
    if wanted not in (None, "none"):
        sizes = sizes[1:]
    if options.height is not None:
        height = _one_of("height", options.height, [size[0] for size in sizes])
        sizes = [size for size in sizes if size[0] == height]
    if options.width is not None:
        width = _one_of("width", options.width, [size[1] for size in sizes])
        sizes = [size for size in sizes if size[1] == width]
    return sizes[-1]


def _fine_stages(config: CogVideoConfig, wanted: str) -> str:
    """One of the ways to enlarge that the model has the weights for; refinement needs large frames first."""
    legal = ["none"]
    if config.super_resolution is not None:
        legal.append("direct")
        if config.refinement is not None:
            legal.append("direct+iterative")
    return _one_of("super_resolution", wanted, legal, " (by the parts of this model)")


def _refinement(config: CogVideoConfig, options: Options, draw: CogLMConfig | None) -> tuple[int, ...]:
    wanted = options.super_resolution == "direct+iterative" and draw is not None
    return config.refinement.pass_top_k if wanted and config.refinement is not None else ()


def _notes(config: CogVideoConfig, num_keyframes: int, rounds: int, known: int) -> tuple[str, ...]:
    notes = []
    if rounds > known:
        finest = known_durations(config.sampling)[-1]
        notes.append(
            f"the model knows {known} rounds of interpolation from these key frames: "
            f"each further one of the {rounds} repeats the frame-rate token of {finest} s"
        )
    if num_keyframes > config.keyframes.num_frames:
        trained = config.keyframes.num_frames
        notes.append(f"{num_keyframes} key frames; the model was trained with {trained}")
    return tuple(notes)


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


def _one_of(name: str, got: Choice, legal: Sequence[Choice], why: str = "") -> Choice:
    if got in legal:
        return got
    listed = ", ".join(str(value) for value in legal)
    raise SettingError(f"{name} {got} is not possible; legal: {listed}{why}; nearest: {nearest(got, legal)}")


def nearest(got: Choice, legal: Sequence[Choice]) -> Choice:
    """The legal value that is most like `got`."""
    if isinstance(got, str):
        return max(legal, key=lambda value: SequenceMatcher(None, str(value), got).ratio())
    return min(legal, key=lambda value: abs(float(value) - got))
