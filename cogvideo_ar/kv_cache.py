"""Keys and values of earlier positions: allocated once, filled by place, read without a copy where possible.

Legend: B rows, N heads, S positions, D head dim, C blocks of K columns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shared.cpu_attention import COLUMNS, column_scores, num_blocks


class KVCache:
    """One channel of one layer. Several independent regions lie one behind the other (the windows of the
    temporal channel: what a query may see is then always one contiguous piece)."""

    def __init__(self, rows: int, num_heads: int, head_dim: int, region_sizes: Sequence[int], like: Tensor):
        self.starts = [0, *accumulate(region_sizes)]
        shape = (rows, num_heads, self.starts[-1], head_dim)
        self.keys, self.values = torch.empty(2, *shape, dtype=like.dtype, device=like.device).unbind()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def put(self, k_BNSD: Tensor, v_BNSD: Tensor, position: int, region: int = 0) -> None:
        """Store at `position` of the region, over what may be there; a gap may be left before it."""
        end = position + k_BNSD.shape[2]
        if (size := self.starts[region + 1] - self.starts[region]) < end:
            raise ValueError(f"cache region of {size} positions cannot hold {end}")
        self._put_keys(k_BNSD, position, region)
        self.values[:, :, self._slice(position, end, region)] = v_BNSD

    def _put_keys(self, k_BNSD: Tensor, position: int, region: int) -> None:
        self.keys[:, :, self._slice(position, position + k_BNSD.shape[2], region)] = k_BNSD

    def of_rows(self, rows: slice) -> KVCache:
        """The same memory, some rows of it."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[rows], self.values[rows]
        return part

    def with_regions(self, sizes: Sequence[int]) -> KVCache:
        """An empty one of the same kind."""
        rows, heads, _, dim = self.values.shape
        return type(self)(rows, heads, dim, sizes, self.values)

    def first(self, length: int, region: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of the region's first `length` positions, as views."""
        return self.keys[:, :, self._slice(0, length, region)], self.values_of(length, region)

    def values_of(self, length: int, region: int = 0) -> Tensor:
        """Values of the region's first `length` positions, as a view."""
        return self.values[:, :, self._slice(0, length, region)]

    def take(self, positions_S: Tensor, region: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of these positions of the region, copied."""
        places_S = self.starts[region] + positions_S
        return self.keys.index_select(2, places_S), self.values.index_select(2, places_S)

    def _slice(self, first: int, end: int, region: int) -> slice:
        return slice(self.starts[region] + first, self.starts[region] + end)


class ColumnCache(KVCache):
    """One whose keys lie in columns, for steps on the CPU: [B, N, C, D, K], every region in blocks of its
    own. `scores` reads them where they are."""

    def __init__(self, rows: int, num_heads: int, head_dim: int, region_sizes: Sequence[int], like: Tensor):
        self.starts = [0, *accumulate(region_sizes)]
        self.blocks = [0, *accumulate(num_blocks(size) for size in region_sizes)]
        self.values = like.new_empty(rows, num_heads, self.starts[-1], head_dim)
        self.keys = like.new_empty(rows, num_heads, self.blocks[-1], head_dim, COLUMNS)

    def _put_keys(self, k_BNSD: Tensor, position: int, region: int) -> None:
        done = 0
        while done < k_BNSD.shape[2]:
            block, column = divmod(position + done, COLUMNS)
            part = k_BNSD[:, :, done : done + COLUMNS - column].mT
            self.keys[:, :, self.blocks[region] + block, :, column : column + part.shape[3]] = part
            done += part.shape[3]

    def first(self, length: int, region: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values of the region's first `length` positions, the keys as a copy."""
        blocks = self.keys[:, :, self.blocks[region] : self.blocks[region] + num_blocks(length)]
        return blocks.mT.flatten(2, 3)[:, :, :length], self.values_of(length, region)

    def take(self, positions_S: Tensor, region: int = 0) -> tuple[Tensor, Tensor]:
        blocks_S = self.blocks[region] + positions_S // COLUMNS
        keys = self.keys.mT[:, :, blocks_S, positions_S % COLUMNS]
        return keys, self.values.index_select(2, self.starts[region] + positions_S)

    def scores(self, q_BNPD: Tensor, num_keys: int, region: int = 0) -> Tensor:
        """`q @ k.mT` of the region's first keys [B, N, P, num_keys]."""
        return column_scores(q_BNPD, self.keys[:, :, self.blocks[region] :], num_keys)


@dataclass(frozen=True)
class LayerCache:
    """Both channels of one layer."""

    spatial: KVCache  # text | slots of the current frame; one region for each frame that is under way
    temporal: KVCache  # per region: text | slots of all frames

    def of_rows(self, rows: slice) -> LayerCache:
        return LayerCache(spatial=self.spatial.of_rows(rows), temporal=self.temporal.of_rows(rows))
