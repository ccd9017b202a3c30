"""Tiles: run a stage on overlapping squares of a clip and blend the seams.

Every tile is a clip of its own, so its group norm statistics differ from the whole frame's; the geometry is
the one of diffusers' `AutoencoderKLCogVideoX`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideox_diff.config import VAEConfig

OVERLAP = ((1, 6), (1, 5))  # (height, width) shares of a tile that it has in common with the next


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Geometry of a tiled run; every pair is (height, width)."""

    size: tuple[int, int]  # of a tile, in input places
    step: tuple[int, int]  # from one tile to the next, in input places
    blend: tuple[int, int]  # seam, in output places
    keep: tuple[int, int]  # of a tile that goes into the result, in output places


def encode_tiles(config: VAEConfig) -> Tiles:
    return _tiles(config, config.space_factor, 1)


def decode_tiles(config: VAEConfig) -> Tiles:
    return _tiles(config, 1, config.space_factor)


def run_tiled(stage: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles | None, *, sliced: bool) -> Tensor:
    """Run `stage` on [B, C, T, H, W]; in tiles where given and needed, and clip by clip where `sliced`."""
    if sliced and x.shape[0] > 1:
        return torch.cat([run_tiled(stage, clip, tiles, sliced=False) for clip in x.split(1)])
    if tiles is None or (x.shape[3] <= tiles.size[0] and x.shape[4] <= tiles.size[1]):
        return stage(x)
    rows = [
        [
            stage(x[:, :, :, top : top + tiles.size[0], left : left + tiles.size[1]])
            for left in range(0, x.shape[4], tiles.step[1])
        ]
        for top in range(0, x.shape[3], tiles.step[0])
    ]
    return _join(rows, tiles)


def _join(rows: list[list[Tensor]], tiles: Tiles) -> Tensor:
    """Blend each tile with the blended one above, then with the one to the left; crop; put together."""
    for i, row in enumerate(rows):
        for j in range(len(row)):
            if i > 0:
                row[j] = blend(rows[i - 1][j], row[j], tiles.blend[0], dim=3)
            if j > 0:
                row[j] = blend(row[j - 1], row[j], tiles.blend[1], dim=4)
    cropped = [[tile[:, :, :, : tiles.keep[0], : tiles.keep[1]] for tile in row] for row in rows]
    return torch.cat([torch.cat(row, dim=4) for row in cropped], dim=3)


def blend(before: Tensor, after: Tensor, extent: int, *, dim: int) -> Tensor:
    """Let the first `extent` places of `after` start as the last of `before` and fade into their own."""
    extent = min(extent, before.shape[dim], after.shape[dim])
    shape = [1] * after.ndim
    shape[dim] = extent
    share = (torch.arange(extent, device=after.device) / extent).to(after.dtype).view(shape)
    tail = before.narrow(dim, before.shape[dim] - extent, extent)
    head, rest = after.tensor_split([extent], dim=dim)
    return torch.cat([tail * (1 - share) + head * share, rest], dim=dim)


def _tiles(config: VAEConfig, places_in: int, places_out: int) -> Tiles:
    """Half the native size, cut at whole latents (of `places_in` and `places_out` places), so that the next
    tile begins where what is kept of this one ends."""
    latents = [max(1, side // 2 // config.space_factor) for side in config.sample_size]
    overlap = [
        min(size - 1, -(-size * up // down)) for size, (up, down) in zip(latents, OVERLAP, strict=True)
    ]
    step = [size - common for size, common in zip(latents, overlap, strict=True)]
    return Tiles(
        size=_times(latents, places_in),
        step=_times(step, places_in),
        blend=_times(overlap, places_out),
        keep=_times(step, places_out),
    )


def _times(sides: Sequence[int], factor: int) -> tuple[int, int]:
    return sides[0] * factor, sides[1] * factor
