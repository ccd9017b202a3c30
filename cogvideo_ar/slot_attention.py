"""The two channels of CogVideo's attention for one slot of each of several frames, against caches.

Legend: B rows, N heads, T text, F frames, S slots of a frame, K slots of a region, P slots of a wave, D head
dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_ar.attention import excluded, layer_kinds, region_slots, text_bias
from cogvideo_ar.kv_cache import ColumnCache, KVCache, LayerCache
from cogvideo_ar.layout import SequenceLayout, near_frames, near_slots
from shared.attention import attend
from shared.cpu_attention import weighted_rows

Place = tuple[int, int]  # (frame in the order of the sequence, slot)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one slot does in a channel: where its key goes, and which keys it sees, its own the last. Slots
    behind one another may look together: `position` is then the first one's, `keys` the last one's."""

    region: int
    position: int
    keys: int | Tensor  # that many from the left of the region, or those at these positions
    bias: Tensor | None  # broadcasts to [B, 1, slots, keys]
    slots: int = 1


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
        self.lossy, self.like = num_lost_B is not None, like[:0]
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
        if len(wave) > 1 and not self.lossy:
            self.spatial_looks = joined(self.spatial_looks, self.like)
            self.temporal_looks = [joined(looks, self.like) for looks in self.temporal_looks]

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


def joined(looks: list[Look], like: Tensor) -> list[Look]:
    """Neighbours that lie behind one another in a region become one look."""
    done = looks[:1]
    for look in looks[1:]:
        last = done[-1]
        follows = look.region == last.region and look.position == last.position + last.slots
        if follows and isinstance(look.keys, int) and isinstance(last.keys, int):
            done[-1] = replace(look, position=last.position, slots=last.slots + 1)
        else:
            done.append(look)
    return [_causal(look, like) if look.slots > 1 else look for look in done]


def _causal(look: Look, like: Tensor) -> Look:
    """Every slot sees those before it and itself."""
    assert isinstance(look.keys, int)
    ahead_PK = like.new_full((look.slots, look.keys), excluded(like.dtype)).triu(1 + look.keys - look.slots)
    return replace(look, bias=ahead_PK if look.bias is None else ahead_PK + look.bias)


def _attend_looks(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, looks: list[Look]) -> Tensor:
    """[B, N, P, D]; all keys are stored first, as a slot may see one that is fed beside it."""
    sizes = [look.slots for look in looks]
    for look, k_look, v_look in zip(looks, k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True):
        cache.put(k_look, v_look, look.position, look.region)
    pairs = zip(looks, q.split(sizes, dim=2), strict=True)
    outs = [_attend_look(q_look, cache, look) for look, q_look in pairs]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _attend_look(q: Tensor, cache: KVCache, look: Look) -> Tensor:
    if not isinstance(look.keys, int):
        return attend_slot(q, *cache.take(look.keys, look.region), look.bias)
    if isinstance(cache, ColumnCache):
        scores = cache.scores(q * q.shape[-1] ** -0.5, look.keys, look.region)
        return _weighted(scores, cache.values_of(look.keys, look.region), look.bias)
    return attend_slot(q, *cache.first(look.keys, look.region), look.bias)


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


def attend_slot(q_BNPD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, bias: Tensor | None) -> Tensor:
    """`attend` for few queries a row; on the CPU as products, since torch's kernel there is made for many."""
    if q_BNPD.device.type != "cpu" or q_BNPD.dtype not in (torch.float32, torch.bfloat16):
        return attend(q_BNPD, k_BNSD, v_BNSD, bias=bias)
    # keys as the left factor: a matrix times few vectors, which the libraries read at twice the rate
    scores = (k_BNSD @ (q_BNPD * q_BNPD.shape[-1] ** -0.5).mT).mT.contiguous()
    return _weighted(scores, v_BNSD, bias)


def _weighted(scores_BNPS: Tensor, v_BNSD: Tensor, bias: Tensor | None) -> Tensor:
    return weighted_rows(F.softmax(scores_BNPS if bias is None else scores_BNPS + bias, dim=-1), v_BNSD)
