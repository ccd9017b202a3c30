"""The two channels of CogVideo's attention for one slot of each of several frames, against caches.

Legend: B rows, N heads, T text, F frames, S slots of a frame, K slots of a region, P slots of a wave, D head
dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_ar.attention import excluded, layer_kinds, region_slots, text_bias
from cogvideo_ar.kv_cache import KVCache, LayerCache
from cogvideo_ar.layout import SequenceLayout, near_frames, near_slots
from shared.attention import attend

Place = tuple[int, int]  # (frame in the order of the sequence, slot)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one slot does in a channel: where its key goes, and which keys it sees, its own the last."""

    region: int
    position: int
    keys: int | Tensor  # that many from the left of the region, or those at these positions
    bias: Tensor | None  # broadcasts to [B, 1, 1, keys]


class SlotAttention:
    """The attention context of a step of generation; `aim` chooses the slots.

    What a slot sees in a window is a prefix of its cache region: frames behind it may already be there,
    further on. `num_lanes` is the number of frames under way, each with a region of the spatial cache; one
    suffices where they are made one after the other. `text_room` limits the caches to so many text tokens
    beside the slots, as the released ones are: what comes last in a longer sequence is not kept.
    """

    num_text = 0

    def __init__(
        self,
        layout: SequenceLayout,
        *,
        window: int,
        extent: tuple[int, int, int] = (0, 0, 0),
        like: Tensor,
        text_valid_BT: Tensor | None = None,
        text_weight: float = 0.0,
        text_room: int | None = None,
    ) -> None:
        self.layout, self.base_only, self.num_lanes = layout, layout.base_only, 1
        text = text_bias(text_valid_BT, layout.text_len, text_weight, like)
        num_lost_B = _num_lost(layout, text_valid_BT, like, text_room)
        self.lossy = num_lost_B is not None
        self.spatial_bias = _slot_bias(text, layout.text_len, layout.frame_len, num_lost_B, like)
        num_slots = layout.num_frames * layout.frame_len
        bias = _slot_bias(text, layout.text_len, num_slots, num_lost_B, like)
        self.kinds = [_Regions(layout, window, int(kind), bias) for kind in layer_kinds(layout, window)]
        self.local = _LocalKeys(layout, extent, like.device) if any(extent) else None
        self.spatial_looks: list[Look] = []
        self.temporal_looks: list[list[Look]] = []  # by kind of layer

    def aim(self, wave: tuple[Place, ...]) -> None:
        """The slots of the next step: of different frames, in their order."""
        text, first = self.layout.text_len, self.layout.num_given
        self.spatial_looks = [
            self._look((frame - first) % self.num_lanes, text + slot, text + slot + 1, self.spatial_bias)
            for frame, slot in wave
        ]
        self.temporal_looks = [[self._temporal_look(kind, *place) for place in wave] for kind in self.kinds]

    def spatial(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        assert cache is not None
        return _attend_looks(q, k, v, cache.spatial, self.spatial_looks)

    def temporal(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, layer: int) -> Tensor:
        assert cache is not None
        looks = self.temporal_looks[layer % len(self.temporal_looks)]
        return _attend_looks(q, k, v, cache.temporal, looks)

    def _temporal_look(self, kind: _Regions, frame: int, slot: int) -> Look:
        region, rank, size = kind.places[slot]
        position = self.layout.text_len + frame * size + rank
        keys = position + 1 if self.local is None else self.local.keys(frame, slot)
        return self._look(region, position, keys, kind.biases[region])

    def _look(self, region: int, position: int, keys: int | Tensor, bias: Tensor | None) -> Look:
        if bias is not None:
            bias = bias[..., :keys] if isinstance(keys, int) else bias[..., keys]
            if self.lossy:  # a slot sees itself, kept or not
                bias = F.pad(bias[..., :-1], (0, 1))
        return Look(region=region, position=position, keys=keys, bias=bias)


def _attend_looks(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, looks: list[Look]) -> Tensor:
    """[B, N, P, D]; all keys are stored first, as a slot may see one that is fed beside it."""
    for i, look in enumerate(looks):
        cache.put(k[:, :, i : i + 1], v[:, :, i : i + 1], look.position, look.region)
    outs = []
    for i, look in enumerate(looks):
        if isinstance(look.keys, int):
            seen = cache.first(look.keys, look.region)
        else:
            seen = cache.take(look.keys, look.region)
        outs.append(attend(q[:, :, i : i + 1], *seen, bias=look.bias))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


# ---- masks


def _num_lost(
    layout: SequenceLayout, valid_BT: Tensor | None, like: Tensor, text_room: int | None
) -> Tensor | None:
    """Slots at the end of a full cache that it has no room for [B], or None. Quirk(short_text_cache): the
    released code allots as many slots as there are plus 74 text tokens."""
    if text_room is None or layout.base_only:  # the first frame's caches are those of five frames
        return None
    num_text = torch.tensor([layout.text_len]) if valid_BT is None else valid_BT.sum(1)
    num_lost_B = (num_text - text_room).clamp(min=0).to(like.device)
    return num_lost_B if bool(num_lost_B.any()) else None


def _slot_bias(
    text: Tensor | None, text_len: int, num_slots: int, num_lost_B: Tensor | None, like: Tensor
) -> Tensor | None:
    """Bias of the keys `text | slots` [B or 1, 1, 1, T + slots]; the last `num_lost_B` are excluded."""
    if num_lost_B is None:
        return None if text is None else F.pad(text, (0, num_slots))
    lost_BS = torch.arange(num_slots, device=like.device) >= num_slots - num_lost_B[:, None]
    slots_BS = like.new_zeros(lost_BS.shape).masked_fill(lost_BS, excluded(like.dtype))
    text = like.new_zeros(1, 1, 1, text_len) if text is None else text
    return torch.cat([text.expand(len(slots_BS), -1, -1, -1), slots_BS[:, None, None]], dim=3)


class _Regions:
    """One kind of layer's regions of the temporal cache: (region, rank in it, size) of every slot, and the
    bias of every region's keys."""

    def __init__(self, layout: SequenceLayout, window: int, layer: int, bias: Tensor | None) -> None:
        self.places = [(0, 0, 0)] * layout.frame_len
        self.biases: list[Tensor | None] = []
        text, starts_F1 = torch.arange(layout.text_len), torch.arange(layout.num_frames)[:, None]
        for region, slots in enumerate(region_slots(layout, window, layer)):
            for rank, slot in enumerate(slots.tolist()):
                self.places[slot] = (region, rank, len(slots))
            order = torch.cat([text, (len(text) + starts_F1 * layout.frame_len + slots).flatten()])
            self.biases.append(None if bias is None else bias[..., order.to(bias.device)])


class _LocalKeys:
    """Positions that a generated slot sees under 3D local attention, in a cache region of whole frames."""

    def __init__(self, layout: SequenceLayout, extent: tuple[int, int, int], device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.slots = [row.nonzero().flatten() for row in near_slots(layout.grid, 0, extent)]
        self.frames = [row.nonzero().flatten() for row in near_frames(layout.frame_times, extent[0])]

    def keys(self, frame: int, slot: int) -> Tensor:
        text, near = torch.arange(self.layout.text_len), self.slots[slot]
        before = self.frames[frame][self.frames[frame] < frame]
        starts = len(text) + before[:, None] * self.layout.frame_len
        own = len(text) + frame * self.layout.frame_len + near[near <= slot]
        return torch.cat([text, (starts + near).flatten(), own]).to(self.device)
