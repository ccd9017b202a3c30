"""What one call will do, decided and checked from the configuration alone: before any weights are read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cogvideox_diff.approximate import EXACT, Approximation
from cogvideox_diff.config import CogVideoXConfig, DynamicMode, FramePadding, SamplingConfig, SchedulerName
from cogvideox_diff.geometry import FitFrames, VideoGeometry, fit_frames, fit_short_side, nearest_frames
from cogvideox_diff.guidance import DynamicGuidance, make_guidance
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import first_step, make_scheduler
from shared.config_io import to_plain
from shared.errors import SettingError
from shared.video import Video

Task = Literal["t2v", "i2v", "v2v"]


def tasks_of(config: CogVideoXConfig) -> frozenset[Task]:
    """A model that reads image latents beside the noisy ones needs an image; the others need none."""
    net = config.transformer
    return frozenset({"t2v", "v2v"} if net.in_channels == net.out_channels else {"i2v"})


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """All of a call but its inputs; None is the model's own value. `dynamic_cfg`: True is "upstream".

    `fit_frames` makes another number of frames legal instead of refusing it: "nearest", "pad" (the next one
    above; a given video goes on with its last frame) or "trim" (the next one below)."""

    negative_prompt: str = ""
    num_frames: int | None = None
    height: int | None = None  # pixels
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # up to 1: no guidance
    dynamic_cfg: bool | DynamicMode | None = None
    scheduler: SchedulerName | None = None
    strength: float | None = None  # video-to-video only
    fit_frames: FitFrames | None = None
    frame_padding: FramePadding = "front"  # where 1.5 completes pairs of latent frames
    approximation: Approximation = EXACT


DEFAULTS = CallSettings()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked call. Calls with equal plans can share a batch."""

    task: Task
    geometry: VideoGeometry
    sampling: SamplingConfig
    negative_prompt: str
    fps: float
    guidance_weights: tuple[float, ...] = ()  # of every step, where they change
    approximation: Approximation = EXACT

    @property
    def first_step(self) -> int:
        """Index of the first step that is run."""
        sampling = self.sampling
        return first_step(sampling.num_inference_steps, sampling.strength) if self.task == "v2v" else 0

    @property
    def num_steps(self) -> int:
        """Steps that are run."""
        return self.sampling.num_inference_steps - self.first_step

    @property
    def guided(self) -> bool:
        """Whether the model also predicts without the prompt (at a scale above 1, as in diffusers)."""
        return self.sampling.guidance_scale > 1

    def settings(self) -> dict[str, Any]:
        """The effective settings as JSON values."""
        size = self.geometry
        return {
            "task": self.task,
            "num_frames": size.num_frames,
            "height": size.height,
            "width": size.width,
            "fps": self.fps,
            "negative_prompt": self.negative_prompt,
            **to_plain(self.sampling),
            **({"frame_padding": size.padding} if size.patch_size[0] > 1 else {}),
            **({"guidance_weights": list(self.guidance_weights)} if self.guidance_weights else {}),
            **({"approximate": self.approximation.settings()} if self.approximation.is_on else {}),
        }


def check_request(
    config: CogVideoXConfig,
    settings: CallSettings = DEFAULTS,
    *,
    image: Tensor | None = None,
    video: Video | None = None,
) -> Plan:
    """The plan of a call with these settings and inputs (`image` uint8 [H, W, 3]).

    Raises SettingError for a task, size, length or setting that the model cannot do, naming what is legal and
    nearest."""
    task = _task(config, image, video)
    if task != "v2v" and settings.strength is not None:
        raise SettingError(f"strength {settings.strength} is for video-to-video, and no video was given")
    sampling = _sampling(config, settings)
    if task == "v2v":
        _check_strength(sampling)
    height, width = _size(config, settings, image)
    num_frames = _num_frames(config, settings, video)
    geometry = VideoGeometry.of(
        config, height=height, width=width, num_frames=num_frames, padding=settings.frame_padding
    )
    plan = Plan(
        task=task,
        geometry=geometry,
        sampling=sampling,
        negative_prompt=settings.negative_prompt,
        fps=config.geometry.fps if video is None else video.fps,
        approximation=settings.approximation,
    )
    return replace(plan, guidance_weights=_changing_weights(config, plan))


def check_dtype(trained: torch.dtype, chosen: torch.dtype) -> None:
    """SettingError for float16 where a model was trained in bfloat16: it overflows."""
    if chosen == torch.float16 and trained == torch.bfloat16:
        raise SettingError("got float16 for a model trained in bfloat16; legal: bfloat16 (nearest), float32")


def plan_inversion(config: CogVideoXConfig, settings: CallSettings, video: Video) -> Plan:
    """The plan of finding the noise of `video`, and of sampling from it: with DDIM and, unless a scale is
    given, without guidance. An image-to-video model is given the first frame. SettingError as in
    `check_request`."""
    if settings.scheduler not in (None, "ddim") or settings.strength is not None:
        raise SettingError("inversion runs the ddim scheduler over all steps; legal: ddim, and no strength")
    if settings.approximation.is_on:
        raise SettingError("noise is found by the exact model; legal: no approximation")
    scale = 1.0 if settings.guidance_scale is None else settings.guidance_scale
    count = _num_frames(config, settings, video)
    settings = replace(settings, num_frames=count, fit_frames=None, scheduler="ddim", guidance_scale=scale)
    image = video.frames[0] if tasks_of(config) == {"i2v"} else None
    plan = check_request(config, settings, image=image)
    if plan.num_steps < 2:
        raise SettingError("a single step has no inverse; num_inference_steps must be at least 2, got 1")
    return replace(plan, fps=video.fps)


def _changing_weights(config: CogVideoXConfig, plan: Plan) -> tuple[float, ...]:
    """What dynamic guidance comes to at each step, which nobody would guess from its settings."""
    guide = make_guidance(plan.sampling, plan.num_steps)
    if not isinstance(guide, DynamicGuidance) or not plan.guided:
        return ()
    scheduler = make_scheduler(NoiseSchedule.from_config(config.schedule), plan.sampling)
    timesteps = scheduler.timesteps[plan.first_step :]
    return tuple(round(guide.weight(timestep, i), 4) for i, timestep in enumerate(timesteps))


def _task(config: CogVideoXConfig, image: Tensor | None, video: Video | None) -> Task:
    if image is not None and video is not None:
        raise SettingError("got an image and a video; give one of them")
    task: Task = "i2v" if image is not None else "v2v" if video is not None else "t2v"
    legal = tasks_of(config)
    if task in legal:
        _check_image(image)
        return task
    if legal == {"i2v"}:
        got = "a video" if video is not None else "no image"
        raise SettingError(f"this is an image-to-video model: it needs an image, got {got}")
    raise SettingError(
        f"this model makes {' and '.join(sorted(legal))}, not i2v: an image needs a transformer that reads "
        f"{2 * config.transformer.out_channels} channels, this one reads {config.transformer.in_channels}"
    )


def _check_image(image: Tensor | None) -> None:
    if image is None:
        return
    shape = tuple(image.shape)
    if image.dtype != torch.uint8 or len(shape) != 3 or shape[-1] != 3 or 0 in shape:
        raise SettingError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(shape)}")


def _sampling(config: CogVideoXConfig, settings: CallSettings) -> SamplingConfig:
    names = ("num_inference_steps", "guidance_scale", "dynamic_cfg", "scheduler", "strength")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    if given.get("dynamic_cfg") is True:
        given["dynamic_cfg"] = "upstream"
    try:
        sampling = replace(config.sampling, **given)
    except ValueError as error:
        raise SettingError(f"{error}{_nearest(given)}") from error
    steps, most = sampling.num_inference_steps, config.schedule.num_timesteps
    if steps > most:
        raise SettingError(f"num_inference_steps must be in 1..{most}, got {steps}; nearest: {most}")
    return sampling


def _nearest(given: Mapping[str, object]) -> str:
    scheduler = str(given.get("scheduler", ""))
    close = difflib.get_close_matches(scheduler.lower(), ["ddim", "dpm"], n=1)
    return f"; nearest: {close[0]}" if close and close[0] != scheduler else ""


def _check_strength(sampling: SamplingConfig) -> None:
    steps = sampling.num_inference_steps
    if int(steps * sampling.strength) < 1:
        raise SettingError(
            f"strength {sampling.strength} keeps none of {steps} steps; nearest: {1 / steps:.3g} (1 step)"
        )


def _num_frames(config: CogVideoXConfig, settings: CallSettings, video: Video | None) -> int | None:
    """A given video decides where nothing else does; a smaller count takes its beginning."""
    wanted, how, size = settings.num_frames, settings.fit_frames, config.geometry
    if video is not None:
        wanted = video.num_frames if wanted is None else wanted
        if how == "trim":
            wanted = min(wanted, video.num_frames)
        if wanted > video.num_frames and how is None:
            raise SettingError(
                f"num_frames {wanted} exceeds the given video's {video.num_frames} frames; nearest: "
                f"{nearest_frames(video.num_frames, size.frame_step, size.max_frames)} (fit_frames pads it)"
            )
    if wanted is None or how is None:
        return wanted
    return fit_frames(wanted, size.frame_step, size.max_frames, how)


def _size(
    config: CogVideoXConfig, settings: CallSettings, image: Tensor | None
) -> tuple[int | None, int | None]:
    """(height, width). The 1.5 image-to-video model takes its size from the image's shape: the native short
    side, the long one in proportion and at most the native one (SAT-1.5's `inference.yaml`)."""
    free = config.transformer.grid_rule == "slice" and settings.height is None and settings.width is None
    if image is None or not free:
        return settings.height, settings.width
    native = config.geometry
    unit = config.vae.space_factor * config.transformer.patch_size[1]
    most = max(native.height, native.width)
    height, width = fit_short_side(image.shape[0], image.shape[1], min(native.height, native.width), unit)
    return min(height, most), min(width, most)
