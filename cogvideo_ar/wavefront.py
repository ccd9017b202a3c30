"""Exact parallel decoding: with a limited temporal channel a frame starts before the one before it is done.

With windows, or 3D local attention, a slot depends on a part of the earlier frames only. How far that part
reaches follows from the masks, taken through all layers; every slot is then fed in the first step in which
all that it depends on has been fed (or is fed beside it). No token can tell the difference from one slot at a
time. The paper's bound for the same idea (its section on parallel generation) allows nothing at the released
sizes.

Legend: G generated frames, S slots of a frame, B samples, R rows = B or 2B, P slots of a wave, N heads, D
head dim, V image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from cogvideo_ar.config import CogVideoConfig, TransformerConfig
from cogvideo_ar.generation import Sample, prefill
from cogvideo_ar.kv_cache import LayerCache
from cogvideo_ar.layout import (
    SequenceLayout,
    image_layout,
    interpolation_layout,
    keyframe_layout,
    near_slots,
)
from cogvideo_ar.sampling import guide
from cogvideo_ar.slot_attention import Place
from cogvideo_ar.transformer import CogVideoTransformer

# ---- what depends on what


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve everybody, whoever asks first
def dependencies(
    grid: tuple[int, int],
    window: int,
    num_layers: int,
    num_frames: int,
    extent: tuple[int, int, int] = (0, 0, 0),
    spacing: int = 1,
) -> Tensor:
    """Whether a slot's logits depend on a slot of the frame d before it, bool [d, S, S] for d < num_frames.

    Frames see the frames before them, and themselves causally; they stand `spacing` apart in display time.
    `window` and `extent` are the temporal channel's, 0 is no limit.
    """
    size = grid[0] * grid[1]
    reach_DSS = torch.zeros(num_frames, size, size)
    reach_DSS[0] = torch.eye(size)
    farthest = (extent[0] - 1) // spacing if extent[0] else num_frames
    unchanged = 0
    for layer in reversed(range(num_layers)):
        near_SS = near_slots(grid, window, extent, shifted=bool(layer % 2)).float()
        before = reach_DSS
        reach_DSS = _one_layer_down(before, near_SS, farthest)
        unchanged = unchanged + 1 if torch.equal(reach_DSS, before) else 0
        if unchanged == 2:  # neither kind of layer adds anything
            break
    return reach_DSS > 0


def _one_layer_down(reach_DSS: Tensor, near_SS: Tensor, farthest: int) -> Tensor:
    """Follow every dependency through one more layer: to earlier slots of its frame, and to near slots of the
    `farthest` frames before it."""
    own = reach_DSS @ torch.ones_like(near_SS).tril()
    for frame in range(1, len(own)):
        own[frame] += reach_DSS[max(0, frame - farthest) : frame].sum(0) @ near_SS
    return (own > 0).float()


def last_needed(
    grid: tuple[int, int],
    window: int,
    num_layers: int,
    num_frames: int,
    extent: tuple[int, int, int] = (0, 0, 0),
    spacing: int = 1,
) -> Tensor:
    """The last slot of the frame d before it that a slot depends on [d, S]; -1: none."""
    needed_DSS = dependencies(grid, window, num_layers, num_frames, extent, spacing)
    return (needed_DSS * torch.arange(1, needed_DSS.shape[2] + 1)).amax(2) - 1


# ---- schedule


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which slots are fed in which step; the slots of a wave belong to different frames, in their order."""

    waves: tuple[tuple[Place, ...], ...]

    @property
    def num_steps(self) -> int:
        return len(self.waves)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.waves))

    @property
    def max_parallel(self) -> int:
        return max(map(len, self.waves))


def wavefront_schedule(config: TransformerConfig, layout: SequenceLayout) -> Schedule:
    """The earliest possible schedule of the frames behind the given ones."""
    frames = range(layout.num_given, layout.num_frames)
    window, extent = (0, (0, 0, 0)) if layout.base_only else (config.window, config.extent)
    spacing = _spacing(layout.frame_times[layout.num_given :])
    num_frames = max(1, len(frames))
    needed = last_needed(layout.grid, window, config.num_layers, num_frames, extent, spacing).tolist()
    steps = _earliest_steps(needed, len(frames))
    waves: list[list[Place]] = [[] for _ in range(1 + max(row[-1] for row in steps))] if steps else []
    for frame, row in zip(frames, steps, strict=True):
        for slot, step in enumerate(row):
            waves[step].append((frame, slot))
    return Schedule(waves=tuple(map(tuple, waves)))


def _spacing(times: tuple[int, ...]) -> int:
    """Frames of display time between neighbours; ValueError where they do not stand evenly."""
    gaps = {after - before for before, after in pairwise(times)}
    if len(gaps) > 1:
        raise ValueError(f"frames at {times} are not evenly spaced")
    return gaps.pop() if gaps else 1


def _earliest_steps(needed: list[list[int]], num_frames: int) -> list[list[int]]:
    """Step of every slot of every generated frame: after its predecessor, not before what it depends on."""
    steps: list[list[int]] = []
    for frame in range(num_frames):
        row: list[int] = []
        for slot in range(len(needed[0])):
            earliest = row[-1] + 1 if row else 0
            lasts = [(frame - back, needed[back][slot]) for back in range(1, frame + 1)]
            row.append(max([earliest, *(steps[earlier][last] for earlier, last in lasts if last >= 0)]))
        steps.append(row)
    return steps


def sequential_steps(config: CogVideoConfig) -> dict[str, int]:
    """Steps one after the other for a video, by stage: the rounds of the interpolation count once each, as
    their gaps are filled side by side."""
    keyframes, interpolation = config.keyframes, config.interpolation
    steps = {
        "first frame": _num_steps(keyframes, image_layout(keyframes, 0)),
        "key frames": _num_steps(keyframes, keyframe_layout(keyframes, 0)),
    }
    round_steps = _num_steps(interpolation, interpolation_layout(interpolation, 0))
    rounds = enumerate(config.sampling.interpolation_durations, start=1)
    return steps | {f"round {number}": round_steps for number, _ in rounds}


def _num_steps(config: TransformerConfig, layout: SequenceLayout) -> int:
    """Waves, or as many as there are tokens with the full channel, which gains one step a frame at most."""
    schedule = wavefront_schedule(config, layout)
    return schedule.num_tokens if config.temporal == "full" else schedule.num_steps


# ---- decoding


@torch.inference_mode()
def generate_tokens_in_waves(
    model: CogVideoTransformer,
    layout: SequenceLayout,
    texts: list[list[int]],
    given_BGS: Tensor,
    sample: Sample,
    *,
    guidance_alpha: float | None = None,
    text_weight: float = 0.0,
    release: bool = False,
) -> Tensor:
    """`generate_tokens` in the steps of `wavefront_schedule`: the same arguments, the same tokens. `sample`
    is asked for other tokens in between, so it must go by the token's number alone."""
    num_samples, num_given, frame_len = given_BGS.shape
    if num_given != layout.num_given:
        raise ValueError(f"the layout has {layout.num_given} given frames, got {num_given}")
    groups = 1 if guidance_alpha is None else 2
    state = prefill(model, layout, texts, given_BGS, groups=groups, text_weight=text_weight, release=release)
    state.context.num_lanes = max(1, layout.num_frames - layout.num_given)
    state.caches = [_with_lanes(cache, layout, state.context.num_lanes) for cache in state.caches]
    # one slot longer: behind a frame's last token comes the next frame's start-of-image
    frames_BFS = given_BGS.new_empty(num_samples, layout.num_frames, 1 + frame_len)
    frames_BFS[:, :, 0] = model.config.start_of_image
    frames_BFS[:, :num_given, 1:] = given_BGS
    for wave in wavefront_schedule(model.config, layout).waves:
        fed_BP = torch.stack([frames_BFS[:, frame, slot] for frame, slot in wave], dim=1)
        logits_RPV = model.feed(fed_BP.repeat(groups, 1), wave, state)
        if guidance_alpha is not None:
            logits_RPV = guide(logits_RPV[:num_samples], logits_RPV[num_samples:], guidance_alpha)
        for (frame, slot), logits_BV in zip(wave, logits_RPV.unbind(1), strict=True):
            number = (frame - num_given) * frame_len + slot
            frames_BFS[:, frame, slot + 1] = sample(logits_BV, number)
    return frames_BFS[:, :, 1:]


def _with_lanes(cache: LayerCache, layout: SequenceLayout, num_lanes: int) -> LayerCache:
    """The spatial channel with a region for each generated frame instead of one for the current frame."""
    lanes = cache.spatial.with_regions([layout.text_len + layout.frame_len] * num_lanes)
    for lane in range(num_lanes):
        lanes.put(*cache.spatial.first(layout.text_len), 0, lane)
    return LayerCache(spatial=lanes, temporal=cache.temporal)
