"""Clips longer than the model makes, by chaining: every clip continues the end of the one before.

This is an extension; the release has nothing of the kind. A text model keeps the last frames as the known
beginning of the next clip at every noise level ("replacement"), an image-to-video model is given the last
one. Errors add up from clip to clip: `drift` measures that, and the result carries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cogvideox_diff import conditioning
from cogvideox_diff.codec import encode_video
from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.generation import NOTHING, Callback, Engine, Given, Item
from cogvideox_diff.geometry import VideoGeometry, nearest_frames
from cogvideox_diff.pipeline import CogVideoXPipeline
from cogvideox_diff.planning import CallSettings, Plan, check_request, tasks_of
from shared.errors import SettingError
from shared.protocol import StageStats
from shared.video import Video

NOTE = "an extension, not in the release: chained clips drift"


@dataclass(frozen=True, kw_only=True)
class Chain:
    """How many clips, and of how many frames of the one before each begins (None: 5, or 1 from an image)."""

    num_clips: int = 2
    overlap: int | None = None

    def settings(self) -> dict[str, Any]:
        """JSON values for the sidecar."""
        return {"num_clips": self.num_clips, "overlap": self.overlap, "note": NOTE}

    def checked(self, config: CogVideoXConfig, geometry: VideoGeometry, start: Video | None) -> Chain:
        """With the overlap that will be used. SettingError names what is legal: a model of images overlaps by
        one frame, the others by 4k+1 that are fewer than a clip has and no more than a given video has."""
        if self.num_clips < 1:
            raise SettingError(f"num_clips must be at least 1, got {self.num_clips}; nearest: 1")
        if tasks_of(config) == {"i2v"}:
            if self.overlap not in (None, 1):
                raise SettingError(f"an image-to-video model continues 1 frame, got overlap {self.overlap}")
            return replace(self, overlap=1)
        factor = config.vae.time_factor
        most = geometry.num_frames - factor
        if start is not None:
            most = min(most, (start.num_frames - 1) // factor * factor + 1)
        if most < 1:
            raise SettingError(f"clips of {geometry.num_frames} frames leave nothing to continue")
        overlap = min(factor + 1, most) if self.overlap is None else self.overlap
        if overlap < 1 or overlap > most or (overlap - 1) % factor:
            nearest = nearest_frames(overlap, factor, most)
            raise SettingError(f"overlap must be {factor}k+1 up to {most}, got {overlap}; nearest: {nearest}")
        return replace(self, overlap=overlap)


@dataclass(frozen=True, kw_only=True)
class ClipDrift:
    """How a clip differs from the first: `colour` is the distance of their mean colours (RGB, 0..255),
    `contrast` and `sharpness` are ratios of the pixels' spread and of the differences between neighbours."""

    clip: int
    colour: float
    contrast: float
    sharpness: float


def drift(clips: Sequence[Video]) -> list[ClipDrift]:
    """Of every clip relative to the first; of equal clips 0, 1 and 1. ValueError without clips."""
    if not clips:
        raise ValueError("there are no clips to compare")
    looks = [_look(clip) for clip in clips]
    colour, contrast, sharpness = looks[0]
    return [
        ClipDrift(
            clip=i,
            colour=round(float((own - colour).norm()), 3),
            contrast=round(spread / max(contrast, 1e-6), 4),
            sharpness=round(edges / max(sharpness, 1e-6), 4),
        )
        for i, (own, spread, edges) in enumerate(looks)
    ]


def _look(clip: Video) -> tuple[Tensor, float, float]:
    """(mean colour [3], standard deviation within a frame, mean difference between neighbouring pixels)."""
    frames = clip.frames.double()  # [T, H, W, 3]
    edges = (frames.diff(dim=1).abs().mean() + frames.diff(dim=2).abs().mean()) / 2
    spread = frames.flatten(1, 2).std(dim=1).mean() if clip.height * clip.width > 1 else torch.zeros(())
    return frames.mean(dim=(0, 1, 2)), float(spread), float(edges)


@dataclass(frozen=True, kw_only=True)
class Extended:
    """The whole video, a given start included; the parts that were made, without overlaps; their drift
    relative to the given start or else to the first clip; the cost; what the user should know."""

    video: Video
    clips: list[Video]
    drift: list[ClipDrift]
    stages: dict[str, StageStats]
    warnings: tuple[str, ...] = ()


def extend(
    pipeline: CogVideoXPipeline,
    prompts: str | Sequence[str],
    chain: Chain,
    settings: CallSettings,
    *,
    seed: int = 0,
    image: Tensor | None = None,
    start: Video | None = None,
    callback: Callback | None = None,
) -> Extended:
    """Chain `chain.num_clips` clips; `prompts` one for all or one for each. `start` is a video to continue,
    `image` (uint8 [H, W, 3]) the first frame for an image-to-video model. Clip i draws its own noise.

    SettingError for what the model cannot do, and for fewer prompts than clips."""
    texts = [prompts] * chain.num_clips if isinstance(prompts, str) else list(prompts)
    if len(texts) != chain.num_clips:
        raise SettingError(f"got {len(texts)} prompts for {chain.num_clips} clips; give one, or one for each")
    plan = plan_chain(pipeline.config, settings, image=image, start=start)
    chain = chain.checked(pipeline.config, plan.geometry, start)
    begun = None if start is None else _cut(start, plan)
    made: list[Video] = []
    costs: list[dict[str, StageStats]] = []
    notes: list[str] = []
    for i, text in enumerate(texts):
        known = _joined([begun, *made])  # a clip's new frames may be fewer than the overlap
        item = Item(prompt=text, seed=seed, sample=i, image=image)
        given, item = _begun(pipeline.engine, plan, item, chain, known)
        batch = pipeline.engine.run([item], plan, given, callback=_counted(callback, i, chain))
        assert batch.pixels is not None
        overlap = 0 if known is None else chain.overlap or 0
        made.append(Video.from_pixels(batch.pixels[0, :, overlap:], plan.fps))
        costs.append(batch.stages)
        notes += batch.warnings[0]
    parts = made if begun is None else [begun, *made]
    whole = _joined(parts)
    assert whole is not None
    said = tuple(dict.fromkeys(notes))
    return Extended(video=whole, clips=made, drift=drift(parts), stages=_summed(costs), warnings=said)


def _joined(parts: Sequence[Video | None]) -> Video | None:
    """One after the other; None for none."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    return Video(frames=torch.cat([part.frames for part in there]), fps=there[0].fps)


def plan_chain(
    config: CogVideoXConfig,
    settings: CallSettings,
    *,
    image: Tensor | None = None,
    start: Video | None = None,
) -> Plan:
    """The plan of one clip. SettingError as in `check_request`, and for inputs the model does not take."""
    if tasks_of(config) == {"i2v"}:
        if image is None and start is not None:
            image, start = start.frames[-1], None
    elif image is not None:
        raise SettingError("this model cannot start from an image; legal: a video to continue, or none")
    plan = check_request(config, settings, image=image)
    return plan if start is None else replace(plan, fps=start.fps)


def _begun(engine: Engine, plan: Plan, item: Item, chain: Chain, known: Video | None) -> tuple[Given, Item]:
    """What makes a clip begin with the end of `known`: its last frames, coded as the beginning of a clip."""
    if known is None:
        return NOTHING, item
    if plan.task == "i2v":
        return NOTHING, replace(item, image=known.frames[-1])
    end = Video(frames=known.frames[-(chain.overlap or 1) :], fps=known.fps)
    with engine.placement.computing(engine.parts.vae):
        latents = encode_video(engine.parts.vae, end, tiled=engine.tiled)
    return Given(prefix=latents[None]), item


def _cut(video: Video, plan: Plan) -> Video:
    """All frames in the size of the plan."""
    size = replace(plan.geometry, num_frames=video.num_frames, frame_step=1, max_frames=video.num_frames)
    return Video.from_pixels(conditioning.video_pixels(video, size), video.fps)


def _counted(callback: Callback | None, clip: int, chain: Chain) -> Callback | None:
    """`callback` told of the steps of all clips."""
    if callback is None:
        return None
    return lambda step: callback(
        replace(step, done=clip * step.total + step.done, total=chain.num_clips * step.total)
    )


def _summed(costs: Sequence[dict[str, StageStats]]) -> dict[str, StageStats]:
    names = dict.fromkeys(name for cost in costs for name in cost)
    return {name: _sum([cost[name] for cost in costs if name in cost]) for name in names}


def _sum(parts: Sequence[StageStats]) -> StageStats:
    return StageStats(
        seconds=sum(part.seconds for part in parts),
        peak_bytes=max(part.peak_bytes for part in parts),
        units=sum(part.units for part in parts),
        unit=parts[0].unit,
    )
