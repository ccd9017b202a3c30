"""Keys and values of earlier positions: allocated once, filled by place, read without a copy where possible.

Legend: B rows, N heads, S positions, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


class KVCache:
    """One channel of one layer. Several independent regions lie one behind the other (the windows of the
    temporal channel: what a query may see is then always one contiguous piece)."""

    def __init__(self, rows: int, num_heads: int, head_dim: int, region_sizes: Sequence[int], like: Tensor):
        self.starts = [0, *accumulate(region_sizes)]
        self.kv = torch.empty(
            2, rows, num_heads, self.starts[-1], head_dim, dtype=like.dtype, device=like.device
        )

    def put(self, k_BNSD: Tensor, v_BNSD: Tensor, position: int, region: int = 0) -> None:
        """Store at `position` of the region, over what may be there; a gap may be left before it."""
        start, end = self.starts[region] + position, position + k_BNSD.shape[2]
        if (size := self.starts[region + 1] - self.starts[region]) < end:
            raise ValueError(f"cache region of {size} positions cannot hold {end}")
        self.kv[0, :, :, start : self.starts[region] + end] = k_BNSD
        self.kv[1, :, :, start : self.starts[region] + end] = v_BNSD

    def of_rows(self, rows: slice) -> KVCache:
        """The same memory, some rows of it."""
        part = copy.copy(self)
        part.kv = self.kv[:, rows]
        return part

    def first(self, length: int, region: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of the region's first `length` positions, as views."""
        places = slice(self.starts[region], self.starts[region] + length)
        return self.kv[0, :, :, places], self.kv[1, :, :, places]

    def take(self, positions_S: Tensor, region: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of these positions of the region, copied."""
        k, v = self.kv.index_select(3, self.starts[region] + positions_S).unbind(0)
        return k, v


@dataclass(frozen=True)
class LayerCache:
    """Both channels of one layer."""

    spatial: KVCache  # text | slots of the current frame; one region for each frame that is under way
    temporal: KVCache  # per region: text | slots of all frames

    def of_rows(self, rows: slice) -> LayerCache:
        return LayerCache(spatial=self.spatial.of_rows(rows), temporal=self.temporal.of_rows(rows))
