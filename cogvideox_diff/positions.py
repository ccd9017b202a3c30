"""Where a token is: the 3D sin/cos table (2B) and 3D rotary embedding (5B and later).

Legend: B batch, N heads, S tokens, D width or head dim. A grid is (time, rows, columns) in patches; tokens
run in that order, columns fastest. Tables are float32 and made on the device that is asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cogvideox_diff.config import GridRule

Grid = tuple[int, int, int]
Device = torch.device | str | None

WAVELENGTH = 10000.0


def sincos_table(grid: Grid, dim: int, *, scale: float, device: Device = None) -> Tensor:
    """Fixed table [time * rows * columns, dim]: the first dim/4 values encode time, the next 3 dim/8 the
    column, the last 3 dim/8 the row. Rows and columns are divided by `scale`, time is not."""
    t, y, x = (torch.arange(n, dtype=torch.float64, device=device) for n in grid)
    codes = (
        _sincos(t, dim // 4)[:, None, None],
        _sincos(x / scale, 3 * dim // 8)[None, None],
        _sincos(y / scale, 3 * dim // 8)[None, :, None],
    )
    return torch.cat([code.expand(*grid, -1) for code in codes], dim=-1).flatten(0, 2).float()


def _sincos(position_S: Tensor, dim: int) -> Tensor:
    """[S, dim] in double: sines of dim/2 frequencies, then their cosines."""
    angles = position_S[:, None] * frequencies(dim, device=position_S.device, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def frequencies(dim: int, *, device: Device = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """10000^(-2k/dim) for k = 0 .. dim/2 - 1."""
    return WAVELENGTH ** (-torch.arange(0, dim, 2, dtype=dtype, device=device) / dim)


def timestep_embedding(value_B: Tensor, dim: int) -> Tensor:
    """Sinusoid [B, dim] in float32 of (possibly fractional) values: cosines first, then sines."""
    # Spelt as upstream: at timestep 999 the rounding of another spelling of the frequencies shows (1e-5)
    exponents = -math.log(WAVELENGTH) * torch.arange(dim // 2, dtype=torch.float32, device=value_B.device)
    angles = value_B.float()[:, None] * torch.exp(exponents / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# ---- rotary embedding


def rope_coordinates(
    grid: Grid, sample_grid: Grid, rule: GridRule, device: Device = None
) -> tuple[Tensor, ...]:
    """Coordinates of the (time, rows, columns) of `grid`. "slice": integers, not beyond `sample_grid`.
    "linspace": the grid is fitted into the rows and columns of `sample_grid`, keeping its shape; time stays
    integer."""
    time = torch.arange(grid[0], dtype=torch.float32, device=device)
    if rule == "slice":
        if grid[1] > sample_grid[1] or grid[2] > sample_grid[2]:
            raise ValueError(f"rows x columns {grid[1:]} exceed the model's largest grid {sample_grid[1:]}")
        return time, *(torch.arange(n, dtype=torch.float32, device=device) for n in grid[1:])
    box = fitted_box(grid[1:], sample_grid[1:])
    return time, *(_spread(*span, n, device) for span, n in zip(box, grid[1:], strict=True))


def fitted_box(size: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest box of the shape of `size` (rows, columns) centred in `base`: both (start, stop)."""
    (h, w), (base_h, base_w) = size, base
    if h / w > base_h / base_w:
        box_h, box_w = base_h, round(base_h / h * w)
    else:
        box_h, box_w = round(base_w / w * h), base_w
    top, left = round((base_h - box_h) / 2.0), round((base_w - box_w) / 2.0)
    return (top, top + box_h), (left, left + box_w)


def _spread(start: int, stop: int, count: int, device: Device) -> Tensor:
    # Quirk(rope_linspace_stop): the last point is stop * (n-1)/n: an even division only where start is 0
    return torch.linspace(start, stop * (count - 1) / count, count, dtype=torch.float32, device=device)


def rope_angles(coordinates: tuple[Tensor, ...], head_dim: int) -> Tensor:
    """Angles [tokens, head_dim/2] of 3D RoPE: head_dim/8 of time, then 3 head_dim/16 each of row, column."""
    t, y, x = coordinates
    dims = (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)
    shapes = ((-1, 1, 1, dims[0] // 2), (1, -1, 1, dims[1] // 2), (1, 1, -1, dims[2] // 2))
    parts = [
        (axis[:, None] * frequencies(dim, device=axis.device)).view(shape)
        for axis, dim, shape in zip((t, y, x), dims, shapes, strict=True)
    ]
    grid = (len(t), len(y), len(x))
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)


def rotate(x_BNSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every neighbouring pair of values by its angle; `rope` is (cos, sin), each float32 [S, D/2]."""
    cos_SD, sin_SD = rope
    u0, u1 = x_BNSD.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([u0 * cos_SD - u1 * sin_SD, u1 * cos_SD + u0 * sin_SD], dim=-1)
    return turned.flatten(-2).to(x_BNSD.dtype)
