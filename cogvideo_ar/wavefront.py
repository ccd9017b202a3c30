"""Exact parallel decoding of the windowed temporal channel: a frame starts before the one before it is done.

With windows a slot depends on a part of the earlier frames only. How far that part reaches follows from the
masks, taken through all layers; every slot is then fed in the first step in which all that it depends on has
been fed (or is fed beside it). No token can tell the difference from one slot at a time. The paper's bound
for the same idea (its section on parallel generation) allows nothing at the released sizes.

Legend: G generated frames, S slots of a frame, B samples, R rows = B or 2B, P slots of a wave, N heads, D
head dim, V image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cogvideo_ar.attention import region_slots
from cogvideo_ar.config import TransformerConfig
from cogvideo_ar.generation import Sample, prefill
from cogvideo_ar.kv_cache import KVCache, LayerCache
from cogvideo_ar.layout import SequenceLayout, region_ids
from cogvideo_ar.sampling import guide
from cogvideo_ar.transformer import CogVideoTransformer, DecodeState
from shared.attention import attend

Place = tuple[int, int]  # (frame in the order of the sequence, slot)


# ---- what depends on what


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must serve everybody, whoever asks first
def dependencies(grid: tuple[int, int], window: int, num_layers: int, num_frames: int) -> Tensor:
    """Whether a slot's logits depend on a slot of the frame d before it, bool [d, S, S] for d < num_frames.

    `window` 0 is the full temporal channel. Frames see the frames before them, and themselves causally.
    """
    size = grid[0] * grid[1]
    reach_DSS = torch.zeros(num_frames, size, size)
    reach_DSS[0] = torch.eye(size)
    unchanged = 0
    for layer in reversed(range(num_layers)):
        regions = region_ids(grid, window, shifted=bool(layer % 2))
        before = reach_DSS
        reach_DSS = _one_layer_down(before, (regions[:, None] == regions).float())
        unchanged = unchanged + 1 if torch.equal(reach_DSS, before) else 0
        if unchanged == 2:  # neither kind of layer adds anything
            break
    return reach_DSS > 0


def _one_layer_down(reach_DSS: Tensor, same_region_SS: Tensor) -> Tensor:
    """Follow every dependency through one more layer: to earlier slots of its frame, and to the same region
    of earlier frames."""
    own = reach_DSS @ torch.ones_like(same_region_SS).tril()
    later_DSS = reach_DSS.cumsum(0)[:-1]  # what is reached in any frame behind
    own[1:] += later_DSS @ same_region_SS
    return (own > 0).float()


def last_needed(grid: tuple[int, int], window: int, num_layers: int, num_frames: int) -> Tensor:
    """The last slot of the frame d before it that a slot depends on [d, S]; -1: none."""
    needed_DSS = dependencies(grid, window, num_layers, num_frames)
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
    needed = last_needed(layout.grid, config.window, config.num_layers, max(1, len(frames))).tolist()
    steps = _earliest_steps(needed, len(frames))
    waves: list[list[Place]] = [[] for _ in range(1 + max(row[-1] for row in steps))] if steps else []
    for frame, row in zip(frames, steps, strict=True):
        for slot, step in enumerate(row):
            waves[step].append((frame, slot))
    return Schedule(waves=tuple(map(tuple, waves)))


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


# ---- decoding


class WaveAttention:
    """One slot of each of several frames per row, against caches that are filled by place.

    What a slot may see is a prefix of its cache region: frames behind it may already be there, further on.
    """

    num_text = 0

    def __init__(self, state: DecodeState, window: int) -> None:
        self.layout, self.bias = state.layout, state.context.bias
        self.base_only = state.layout.base_only
        kinds = range(2 if window else 1)
        self.tables = [] if self.base_only else [_places(state.layout, window, kind) for kind in kinds]
        self.wave: tuple[Place, ...] = ()

    def spatial(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        """Every generated frame has a region of its own: text | slots."""
        assert cache is not None
        text, first = self.layout.text_len, self.layout.num_given
        places = [(frame - first, text + slot) for frame, slot in self.wave]
        return self._attend(q, k, v, cache.spatial, places)

    def temporal(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, layer: int) -> Tensor:
        assert cache is not None
        table = self.tables[layer % len(self.tables)]
        places = []
        for frame, slot in self.wave:
            region, rank, size = table[slot]
            places.append((region, self.layout.text_len + frame * size + rank))
        return self._attend(q, k, v, cache.temporal, places)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, places: list[tuple[int, int]]
    ) -> Tensor:
        """[R, N, P, D]; all keys are stored first, as a frame may see one that is fed beside it."""
        for i, (region, position) in enumerate(places):
            cache.put(k[:, :, i : i + 1], v[:, :, i : i + 1], position, region)
        outs = []
        for i, (region, position) in enumerate(places):
            bias = None if self.bias is None else self.bias[..., : position + 1]
            outs.append(attend(q[:, :, i : i + 1], *cache.first(position + 1, region), bias=bias))
        return torch.cat(outs, dim=2)


def _places(layout: SequenceLayout, window: int, layer: int) -> list[tuple[int, int, int]]:
    """(region, rank in the region, size of the region) of every slot."""
    table = [(0, 0, 0)] * layout.frame_len
    for region, slots in enumerate(region_slots(layout, window, layer)):
        for rank, slot in enumerate(slots.tolist()):
            table[slot] = (region, rank, len(slots))
    return table


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
    state.caches = [_with_lanes(cache, layout) for cache in state.caches]
    context = WaveAttention(state, model.config.window)
    # one slot longer: behind a frame's last token comes the next frame's start-of-image
    frames_BFS = given_BGS.new_empty(num_samples, layout.num_frames, 1 + frame_len)
    frames_BFS[:, :, 0] = model.config.start_of_image
    frames_BFS[:, :num_given, 1:] = given_BGS
    for wave in wavefront_schedule(model.config, layout).waves:
        frames, slots = (list(part) for part in zip(*wave, strict=True))
        logits_RPV = _step(model, frames_BFS[:, frames, slots].repeat(groups, 1), wave, state, context)
        if guidance_alpha is not None:
            logits_RPV = guide(logits_RPV[:num_samples], logits_RPV[num_samples:], guidance_alpha)
        for (frame, slot), logits_BV in zip(wave, logits_RPV.unbind(1), strict=True):
            number = (frame - num_given) * frame_len + slot
            frames_BFS[:, frame, slot + 1] = sample(logits_BV, number)
    return frames_BFS[:, :, 1:]


def _step(
    model: CogVideoTransformer,
    tokens_RP: Tensor,
    wave: tuple[Place, ...],
    state: DecodeState,
    context: WaveAttention,
) -> Tensor:
    """Feed one slot of each of several frames; logits [R, P, V], float32 unless the model is float64."""
    context.wave = wave
    rows = [frame * state.layout.frame_len + slot for frame, slot in wave]
    x_RPC = model.word_embeddings(tokens_RP) + state.positions[rows]
    for block, cache in zip(model.blocks, state.caches, strict=True):
        x_RPC = block(x_RPC, context, cache)
    logits_RPV = model.image_logits(model.final_norm(x_RPC))
    return logits_RPV if logits_RPV.dtype == torch.float64 else logits_RPV.float()


def _with_lanes(cache: LayerCache, layout: SequenceLayout) -> LayerCache:
    """The spatial channel with a region for each generated frame instead of one for the current frame."""
    _, rows, num_heads, _, head_dim = cache.spatial.kv.shape
    num_lanes = max(1, layout.num_frames - layout.num_given)
    sizes = [layout.text_len + layout.frame_len] * num_lanes
    lanes = KVCache(rows, num_heads, head_dim, sizes, cache.spatial.kv)
    for lane in range(num_lanes):
        lanes.put(*cache.spatial.first(layout.text_len), 0, lane)
    return LayerCache(spatial=lanes, temporal=cache.temporal)
