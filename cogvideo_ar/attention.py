"""The two channels of CogVideo's attention, over a whole sequence and one cached step at a time.

Spatial (upstream "base"): text | own frame. Temporal (upstream "attention plus"): text | slots of several
frames, of the whole frame or inside a window. A context holds what all layers share (masks, windows) and
offers the two channels; the transformer does not know which context it runs in, so training and generation
share every line outside this file.

Legend: B batch, N heads, T text, F frames, S slots of a frame, L sequence = T + F*S, W windows, K slots of
a window, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_ar.kv_cache import KVCache, LayerCache
from cogvideo_ar.layout import SequenceLayout, region_ids, window_slots
from shared.attention import attend


class AttentionContext(Protocol):
    """Attention of one forward pass; q, k, v are [B, N, L, D]."""

    num_text: int  # text rows of the hidden states; they take part in the spatial channel only
    base_only: bool

    def spatial(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        """Context vectors of all rows [B, N, L, D]."""
        ...

    def temporal(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, layer: int) -> Tensor:
        """Context vectors of the slots alone [B, N, F*S, D]."""
        ...


def excluded(dtype: torch.dtype) -> float:
    """Added to the score of an unseen key; finite, so that a text of nothing but padding is no NaN."""
    return torch.finfo(dtype).min / 4


def text_bias(valid_BT: Tensor | None, text_len: int, weight: float, like: Tensor) -> Tensor | None:
    """Bias of the text keys [B or 1, 1, 1, T]; None where it would be zero."""
    if valid_BT is None:
        return like.new_full((1, 1, 1, text_len), weight) if weight else None
    bias_BT = like.new_full(valid_BT.shape, weight).masked_fill(~valid_BT, excluded(like.dtype))
    return bias_BT[:, None, None]


@dataclass(frozen=True, kw_only=True)
class KeyRange:
    """Consecutive frames of a window that see the same first keys."""

    queries: slice  # of the frames' slots, window by window
    num_keys: int  # text and slots, from the left
    bias: Tensor | None  # broadcasts to [B * W, 1, queries, num_keys]


@dataclass(frozen=True, kw_only=True)
class TemporalPlan:
    """Windows of one kind of layer."""

    slots: Tensor | None  # [W, K]; None: one window in raster order
    ranges: tuple[KeyRange, ...]


class FullAttention:
    """All rows at once: training, scoring, and the prefill of a generation.

    `like` [B, L, C] gives rows, dtype and device of the masks. `text_weight` is added to the scores of
    slots -> text. `text_weight_temporal` and `cyclic` differ from it and from False only to reproduce the
    released prefill.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        *,
        window: int,
        like: Tensor,
        text_valid_BT: Tensor | None = None,
        text_weight: float = 0.0,
        text_weight_temporal: float | None = None,
        cyclic: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.layout, self.num_text, self.dropout = layout, layout.text_len, dropout
        self.base_only, self.window = layout.base_only, window
        self.padding = text_bias(text_valid_BT, layout.text_len, 0.0, like)
        self.frame_bias = _spatial_bias(
            layout, text_bias(text_valid_BT, layout.text_len, text_weight, like), like
        )
        if text_weight_temporal is None:
            text_weight_temporal = text_weight
        bias = text_bias(text_valid_BT, layout.text_len, text_weight_temporal, like)
        kinds = () if self.base_only else (False, True) if window else (False,)
        self.plans = [_temporal_plan(layout, window, shifted, bias, like, cyclic) for shifted in kinds]

    def spatial(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        text, num_frames = self.num_text, self.layout.num_frames
        if cache is not None:  # the given frames are complete: nothing will look at their slots here
            cache.spatial.append(k[:, :, :text], v[:, :, :text])
        text_out = self._attend(q[:, :, :text], k[:, :, :text], v[:, :, :text], self.padding)
        if num_frames == 0:
            return text_out
        frames = (_fold_frames(x[:, :, text:], num_frames) for x in (q, k, v))
        q_f, k_f, v_f = frames
        k_f, v_f = (_prepend(x[:, :, :text], y, num_frames) for x, y in ((k, k_f), (v, v_f)))
        out = self._attend(q_f, k_f, v_f, self.frame_bias)  # [B * F, N, S, D]
        out = out.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(2, 3)
        return torch.cat([text_out, out], dim=2)

    def temporal(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, layer: int) -> Tensor:
        if cache is not None:
            self._fill(cache.temporal, k, v, layer)
        plan, text = self.plans[layer % len(self.plans)], self.num_text
        if plan.slots is None:
            return self._attend_ranges(plan, q[:, :, text:], k, v)
        num_windows, frames = plan.slots.shape[0], self.layout.num_frames
        q_w, k_w, v_w = (_fold_windows(x[:, :, text:], plan.slots, frames) for x in (q, k, v))
        k_w, v_w = (_prepend(x[:, :, :text], y, num_windows) for x, y in ((k, k_w), (v, v_w)))
        return _unfold_windows(self._attend_ranges(plan, q_w, k_w, v_w), plan.slots, frames)

    def _attend_ranges(self, plan: TemporalPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            self._attend(q[:, :, r.queries], k[:, :, : r.num_keys], v[:, :, : r.num_keys], r.bias)
            for r in plan.ranges
        ]
        return torch.cat(parts, dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.dropout:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.dropout)
        return attend(q, k, v, bias=bias)

    def _fill(self, cache: KVCache, k: Tensor, v: Tensor, layer: int) -> None:
        text, frames = self.num_text, self.layout.num_frames
        for region, slots in enumerate(region_slots(self.layout, self.window, layer)):
            cache.append(k[:, :, :text], v[:, :, :text], region)
            if frames:
                k_r, v_r = (
                    x[:, :, text:].unflatten(2, (frames, -1))[:, :, :, slots].flatten(2, 3) for x in (k, v)
                )
                cache.append(k_r, v_r, region)


class StepAttention:
    """One slot per row, against the caches; `bias` is [rows or 1, 1, 1, T + F*S], zero behind the text."""

    num_text = 0

    def __init__(self, *, base_only: bool, bias: Tensor | None, regions: tuple[list[int], ...]) -> None:
        self.base_only, self.bias, self.regions = base_only, bias, regions
        self.slot = 0

    def spatial(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        assert cache is not None
        return self._attend(q, *cache.spatial.append(k, v))

    def temporal(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None, layer: int) -> Tensor:
        assert cache is not None
        region = self.regions[layer % len(self.regions)][self.slot]
        return self._attend(q, *cache.temporal.append(k, v, region))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, bias=None if self.bias is None else self.bias[..., : k.shape[2]])


def region_slots(layout: SequenceLayout, window: int, layer: int) -> list[Tensor]:
    """Slots of every region of the layer."""
    ids_S = region_ids(layout.grid, window, shifted=bool(layer % 2))
    return [(ids_S == region).nonzero().flatten() for region in range(int(ids_S.max()) + 1)]


# ---- masks


def _spatial_bias(layout: SequenceLayout, text: Tensor | None, like: Tensor) -> Tensor | None:
    """[B * F or 1, 1, S, T + S]: text as `text` says, the own frame causally unless it is bidirectional."""
    if layout.num_frames == 0:
        return None
    causal_SS = like.new_full((layout.frame_len,) * 2, excluded(like.dtype)).triu(1)
    causal_F = torch.arange(layout.num_frames, device=like.device) >= layout.num_bidirectional
    own_FSS = causal_SS * causal_F[:, None, None]
    per_row = text is not None and text.shape[0] > 1
    return _join(text, own_FSS if layout.num_bidirectional or per_row else own_FSS[:1], like, layout.text_len)


def _temporal_plan(
    layout: SequenceLayout, window: int, shifted: bool, text: Tensor | None, like: Tensor, cyclic: bool
) -> TemporalPlan:
    slots_WK = window_slots(layout.grid, window, shifted)
    size = slots_WK.shape[1]
    regions_WK = region_ids(layout.grid, window, shifted)[slots_WK].to(like.device)
    apart = (regions_WK[:, :, None] != regions_WK[:, None]) & (not cyclic)
    apart_WKK = like.new_zeros(apart.shape).masked_fill(apart, excluded(like.dtype))
    spans = [(0, layout.num_bidirectional)] if layout.num_bidirectional else []
    spans += [(i, i + 1) for i in range(layout.num_bidirectional, layout.num_frames)]
    ranges = []
    for first, last in spans:
        block = apart_WKK.repeat(1, last - first, last)
        if last > layout.num_bidirectional:  # a generated frame: its own slots, the last ones, are causal
            block[:, :, -size:] += like.new_full((size, size), excluded(like.dtype)).triu(1)
        queries = slice(first * size, last * size)
        bias = _join(text, block, like, layout.text_len)
        ranges.append(KeyRange(queries=queries, num_keys=layout.text_len + last * size, bias=bias))
    return TemporalPlan(slots=slots_WK.to(like.device) if window else None, ranges=tuple(ranges))


def _join(text: Tensor | None, slots_GQK: Tensor, like: Tensor, text_len: int) -> Tensor | None:
    """Text bias [B or 1, 1, 1, T] beside the slots' bias of G groups -> [B * G, 1, Q, T + K], or [1, 1, Q,
    T + K] where all are alike, or None where nothing is excluded."""
    if text is None and not bool(slots_GQK.any()):
        return None
    groups, queries, _ = slots_GQK.shape
    text = slots_GQK.new_zeros((1, 1, 1, text_len)) if text is None else text
    rows = like.shape[0] if groups > 1 else text.shape[0]
    parts = (text.expand(rows, groups, queries, text_len), slots_GQK.expand(rows, *slots_GQK.shape))
    return torch.cat(parts, dim=3).flatten(0, 1)[:, None]


# ---- folding frames and windows into the batch


def _fold_frames(x_BNLD: Tensor, num_frames: int) -> Tensor:
    """[B, N, F*S, D] -> [B * F, N, S, D]."""
    return x_BNLD.unflatten(2, (num_frames, -1)).transpose(1, 2).flatten(0, 1)


def _prepend(text_BNTD: Tensor, folded: Tensor, groups: int) -> Tensor:
    """Text keys before the keys of each of the `groups` that were folded into the batch."""
    text = text_BNTD[:, None].expand(-1, groups, -1, -1, -1).flatten(0, 1)
    return torch.cat([text, folded], dim=2)


def _fold_windows(x_BNLD: Tensor, slots_WK: Tensor, num_frames: int) -> Tensor:
    """[B, N, F*S, D] -> [B * W, N, F*K, D]."""
    x_BNFWKD = x_BNLD.unflatten(2, (num_frames, -1))[:, :, :, slots_WK]
    return x_BNFWKD.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1)


def _unfold_windows(x: Tensor, slots_WK: Tensor, num_frames: int) -> Tensor:
    """[B * W, N, F*K, D] -> [B, N, F*S, D]."""
    x_BWNFKD = x.unflatten(0, (-1, slots_WK.shape[0])).unflatten(3, (num_frames, -1))
    x_BNFSD = x_BWNFKD.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
    return x_BNFSD[:, :, :, slots_WK.flatten().argsort()].flatten(2, 3)
