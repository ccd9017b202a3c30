"""The two channels of CogVideo's attention over a whole sequence; `slot_attention` has the cached steps.

Spatial (upstream "base"): text | own frame. Temporal (upstream "attention plus"): text | slots of several
frames, of the whole frame, inside a window, or near the query (3D local attention). A context holds what all
layers share (masks, windows) and offers the two channels; the transformer does not know which context it runs
in, so training and generation share every line outside this file.

Legend: B batch, N heads, T text, F frames, S slots of a frame, L sequence = T + F*S, W windows, K slots of
a window, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_ar.kv_cache import LayerCache
from cogvideo_ar.layout import SequenceLayout, near_frames, near_slots, region_ids, window_slots
from shared.attention import attend
from shared.cpu_attention import attend_in_blocks, takes_blocks


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


def relaxed_attend(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, dropout: float = 0.0, alpha: float = 16.0
) -> Tensor:
    """`attend` whose scores stay small in the tensors' own dtype (CogView's PB-relax): they are computed at
    1/alpha of their size and lose the largest of their row before they grow again (upstream: of their head).
    The softmax is the same."""
    scores = (q / (alpha * q.shape[-1] ** 0.5)) @ k.mT
    if bias is not None:
        scores = scores.masked_fill(bias < excluded(bias.dtype) / 2, -torch.inf)
    scores = (scores - scores.detach().amax(-1, keepdim=True)) * alpha
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return F.dropout(weights, dropout) @ v


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
    slots -> text. `window` and `extent` are the temporal channel's (0: no limit). `text_weight_temporal` and
    `cyclic` differ from `text_weight` and from False only to reproduce the released prefill.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        *,
        window: int,
        extent: tuple[int, int, int] = (0, 0, 0),
        like: Tensor,
        text_valid_BT: Tensor | None = None,
        text_weight: float = 0.0,
        text_weight_temporal: float | None = None,
        cyclic: bool = False,
        pb_relax: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.layout, self.num_text, self.dropout = layout, layout.text_len, dropout
        self.base_only, self.window, self.pb_relax = layout.base_only, window, pb_relax
        self.padding = text_bias(text_valid_BT, layout.text_len, 0.0, like)
        self.frame_bias = _spatial_bias(
            layout, text_bias(text_valid_BT, layout.text_len, text_weight, like), like
        )
        if text_weight_temporal is None:
            text_weight_temporal = text_weight
        bias = text_bias(text_valid_BT, layout.text_len, text_weight_temporal, like)
        self.plans = [
            _temporal_plan(
                layout, _hidden(layout, window, extent, shifted, cyclic), window, shifted, bias, like
            )
            for shifted in layer_kinds(layout, window)
        ]

    def spatial(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None) -> Tensor:
        text, num_frames = self.num_text, self.layout.num_frames
        if cache is not None:
            self.fill_spatial(k, v, cache)
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
            self.fill_temporal(k, v, cache, layer)
        plan, text = self.plans[layer % len(self.plans)], self.num_text
        if plan.slots is None:
            return self._attend_ranges(plan, q[:, :, text:], k, v)
        num_windows, frames = plan.slots.shape[0], self.layout.num_frames
        q_w, k_w, v_w = (_fold_windows(x[:, :, text:], plan.slots, frames) for x in (q, k, v))
        k_w, v_w = (_prepend(x[:, :, :text], y, num_windows) for x, y in ((k, k_w), (v, v_w)))
        return _unfold_windows(self._attend_ranges(plan, q_w, k_w, v_w), plan.slots, frames)

    def fill_spatial(self, k: Tensor, v: Tensor, cache: LayerCache) -> None:
        """Store the text's keys and values, which come first. The given frames are complete: nothing will
        look at their slots in this channel."""
        cache.spatial.put(k[:, :, : self.num_text], v[:, :, : self.num_text], 0)

    def fill_temporal(self, k: Tensor, v: Tensor, cache: LayerCache, layer: int) -> None:
        """Store keys and values of the text and of all slots, region by region."""
        text, frames = self.num_text, self.layout.num_frames
        for region, slots in enumerate(region_slots(self.layout, self.window, layer)):
            cache.temporal.put(k[:, :, :text], v[:, :, :text], 0, region)
            if frames:
                k_r, v_r = (
                    x[:, :, text:].unflatten(2, (frames, -1))[:, :, :, slots].flatten(2, 3) for x in (k, v)
                )
                cache.temporal.put(k_r, v_r, text, region)

    def _attend_ranges(self, plan: TemporalPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for r in plan.ranges:
            q_r, k_r, v_r = q[:, :, r.queries], k[:, :, : r.num_keys], v[:, :, : r.num_keys]
            if self.pb_relax:
                parts.append(relaxed_attend(q_r, k_r, v_r, bias=r.bias, dropout=self.dropout))
            else:
                parts.append(self._attend(q_r, k_r, v_r, r.bias))
        return torch.cat(parts, dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.dropout:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.dropout)
        return (attend_in_blocks if takes_blocks(q, k) else attend)(q, k, v, bias=bias)


def layer_kinds(layout: SequenceLayout, window: int) -> tuple[bool, ...]:
    """Whether the windows are shifted, for each kind of layer."""
    return () if layout.base_only else (False, True) if window else (False,)


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


def _hidden(
    layout: SequenceLayout, window: int, extent: tuple[int, int, int], shifted: bool, cyclic: bool
) -> Tensor:
    """Slots that do not see each other though they are in one window of `window_slots`, by place and time:
    bool [W, F, K, F, K]."""
    slots_WK = window_slots(layout.grid, window, shifted)
    near_SS = near_slots(layout.grid, window, extent, shifted=shifted)
    near_WKK = near_SS[slots_WK[:, :, None], slots_WK[:, None]] | (cyclic and window > 0)
    near_FF = near_frames(layout.frame_times, extent[0])
    return ~(near_WKK[:, None, :, None] & near_FF[None, :, None, :, None])


def _temporal_plan(
    layout: SequenceLayout,
    hidden_WFKFK: Tensor,
    window: int,
    shifted: bool,
    text: Tensor | None,
    like: Tensor,
) -> TemporalPlan:
    slots_WK = window_slots(layout.grid, window, shifted)
    size = slots_WK.shape[1]
    spans = [(0, layout.num_bidirectional)] if layout.num_bidirectional else []
    spans += [(i, i + 1) for i in range(layout.num_bidirectional, layout.num_frames)]
    ranges = []
    for first, last in spans:
        hidden = hidden_WFKFK[:, first:last, :, :last].flatten(3, 4).flatten(1, 2)
        if last > layout.num_bidirectional:  # a generated frame: its own slots, the last ones, are causal
            hidden[:, :, -size:] |= torch.ones(size, size, dtype=torch.bool).triu(1)
        hidden = hidden.to(like.device)
        block = like.new_zeros(hidden.shape).masked_fill(hidden, excluded(like.dtype))
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
