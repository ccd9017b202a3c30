"""Attention of grid cells to the cells near them, on one grid or from a fine grid to a coarser one.

The two operations of CogView2's CUDA kernels (Image-Local-Attention) in plain torch. Query (Y, X) is centred
on key cell (Y // a, X // c), a and c being how much finer the query grid is; its window is read row by row,
top left first. Even kernels reach one cell further up and left than down and right.

Legend: B batch of queries, G batch of keys (B is a multiple of it: consecutive queries share keys), H/W query
rows/columns, h/w key rows/columns, K entries of a window, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OUTSIDE = -10000.0  # score of a window entry outside the grid, in every dtype
Kernel = tuple[int, int]  # (rows, columns)


def local_scores(q_BHWD: Tensor, k_GhwD: Tensor, kernel: Kernel, *, causal: bool = False) -> Tensor:
    """Dot products, not scaled, of every query with the keys of its window [B, H, W, K]; sums in float32 or
    wider.

    `causal` keeps what comes before the window's centre in reading order, and the centre. ValueError for a
    causal even kernel, and for grids or batches that are no multiples.
    """
    places = window_places(kernel, causal)
    q = _per_cell(q_BHWD, k_GhwD)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), _padded(k_GhwD, kernel).to(wide)
    scores = torch.stack([(q * cell).sum(-1) for cell in _shifted(k, k_GhwD, places)], dim=-1)
    outside = ~_inside(k_GhwD, kernel, places)[:, None, :, None]  # [h, 1, w, 1, K]
    return scores.masked_fill(outside, OUTSIDE).to(q_BHWD.dtype).reshape(*q_BHWD.shape[:3], -1)


def local_values(weights_BHWK: Tensor, v_GhwD: Tensor, kernel: Kernel, *, causal: bool = False) -> Tensor:
    """Sum of every window's values by `weights` [B, H, W, D]; what lies outside the grid counts for nothing,
    whatever its weight. Products are rounded to the inputs' dtype, sums are float32 or wider."""
    places = window_places(kernel, causal)
    if weights_BHWK.shape[3] != len(places):
        raise ValueError(f"a window of {kernel} has {len(places)} entries, got {weights_BHWK.shape[3]}")
    weights = _per_cell(weights_BHWK, v_GhwD)
    wide = torch.promote_types(v_GhwD.dtype, torch.float32)
    total = weights.new_zeros((*weights.shape[:-1], v_GhwD.shape[3]), dtype=wide)
    for weight, cell in zip(
        weights.unbind(-1), _shifted(_padded(v_GhwD, kernel), v_GhwD, places), strict=True
    ):
        total += weight[..., None] * cell
    return total.to(v_GhwD.dtype).reshape(*weights_BHWK.shape[:3], -1)


def window_places(kernel: Kernel, causal: bool = False) -> list[tuple[int, int]]:
    """(row, column) inside the window of its K entries."""
    rows, columns = kernel
    if min(kernel) < 1 or (causal and not (rows % 2 and columns % 2)):
        raise ValueError(f"kernel must be positive, and odd where causal, got {kernel}")
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return places[: rows * columns // 2 + 1] if causal else places


def _per_cell(x_BHWE: Tensor, key_GhwD: Tensor) -> Tensor:
    """[B, H, W, E] -> [G, B / G, h, H / h, w, W / w, E]: queries beside the key cell that they belong to."""
    whole, parts = x_BHWE.shape[:3], key_GhwD.shape[:3]
    if any(side % part for side, part in zip(whole, parts, strict=True)):
        raise ValueError(
            f"queries {list(whole)} (batch, rows, columns) are no multiple of keys {list(parts)}"
        )
    batch, rows, columns = parts
    return x_BHWE.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).unflatten(0, (batch, -1))


def _padded(x_GhwD: Tensor, kernel: Kernel) -> Tensor:
    """Zeros around the grid, so that every window lies inside."""
    (above, left), (rows, columns) = (side // 2 for side in kernel), kernel
    return F.pad(x_GhwD, (0, 0, left, columns - 1 - left, above, rows - 1 - above))


def _shifted(padded: Tensor, like_GhwD: Tensor, places: list[tuple[int, int]]) -> list[Tensor]:
    """For every window entry the cells it looks at, as views [G, 1, h, 1, w, 1, D]."""
    rows, columns = like_GhwD.shape[1:3]
    return [padded[:, None, i : i + rows, None, j : j + columns, None] for i, j in places]


def _inside(like_GhwD: Tensor, kernel: Kernel, places: list[tuple[int, int]]) -> Tensor:
    """Whether a window entry lies on the grid, bool [h, w, K]."""
    (rows, columns), device = like_GhwD.shape[1:3], like_GhwD.device
    row_K, column_K = torch.tensor(places, device=device).unbind(1)
    row_hK = torch.arange(rows, device=device)[:, None] + row_K - kernel[0] // 2
    column_wK = torch.arange(columns, device=device)[:, None] + column_K - kernel[1] // 2
    row_ok, column_ok = (row_hK >= 0) & (row_hK < rows), (column_wK >= 0) & (column_wK < columns)
    return row_ok[:, None] & column_ok
