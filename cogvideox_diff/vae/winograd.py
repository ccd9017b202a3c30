"""Winograd's convolution F(4x4, 3x3) of frames (Lavin and Gray, arXiv 1509.09308): a fourth of the products.

A tile of 6x6 places becomes 36 values per channel by a fixed matrix, each of the 36 is a matrix product over
the channels of three frames, and another fixed matrix makes 4x4 places of the 36 results. The result is that
of the plain convolution but for rounding: about three times its error in float32, too much in half precision.

Shapes: T frames, H/W rows/columns, C channels in, O channels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import prod

import torch
from torch import Tensor

from cogvideox_diff.cpu_linear import quick_linear

TILE = 4  # places of the result along each side
HALO = 2  # more of the input
TAPS = 3  # frames that a result sees
# Places where the polynomials are compared, beside infinity. 1 and 2 are usual and round twice as much.
POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))


def transform_kernel(weight_OCtHW: Tensor) -> Tensor:
    """[O, C, 3, 3, 3] -> [36, O, 3 * C], frames outside, channels inside."""
    kernel, _, _ = _matrices()
    out_channels = weight_OCtHW.shape[0]
    spread = weight_OCtHW.permute(3, 4, 0, 2, 1).reshape(9, -1)  # (H W) x (O t C)
    return (kernel.to(spread) @ spread).view(len(kernel), out_channels, -1)


def convolve(x_THWC: Tensor, kernel: Tensor, bias_O: Tensor | None, out_THWO: Tensor) -> None:
    """Convolve frames with a border of one place and two frames in front, [T + 2, 4h + 2, 4w + 2, C], into
    `out_THWO` [T, 4h, 4w, O], with a kernel of `transform_kernel`."""
    num_frames, rows, columns, out_channels = out_THWO.shape
    rows, columns = rows // TILE, columns // TILE
    tiles = _transform_tiles(x_THWC, rows, columns)  # 36, tiles, T + 2, C
    windows = (tile.unfold(1, TAPS, 1).transpose(2, 3).flatten(2).flatten(0, 1) for tile in tiles)
    products = torch.empty(len(kernel), rows * columns * num_frames, out_channels)
    for i, window in enumerate(windows):
        products[i] = quick_linear(window, kernel[i])
    results = out_THWO.unflatten(2, (columns, TILE)).unflatten(1, (rows, TILE))
    bias = torch.zeros(()) if bias_O is None else bias_O
    _, _, back = _matrices()
    for row, product in enumerate(products.view(len(kernel), rows, -1).unbind(1)):
        places = (back.to(product) @ product).view(TILE, TILE, columns, num_frames, out_channels)
        torch.add(places.permute(3, 0, 2, 1, 4), bias, out=results[:, row])  # T, 4, columns, 4, O


def _transform_tiles(x_THWC: Tensor, rows: int, columns: int) -> Tensor:
    """[36, rows * columns, T + 2, C], a row of tiles at a time, which stays in the cache."""
    _, forth, _ = _matrices()
    side = TILE + HALO
    tiles = torch.empty(side * side, rows, columns, x_THWC.shape[0], x_THWC.shape[3])
    patches = x_THWC.unfold(1, side, TILE).unfold(2, side, TILE)  # T, rows, columns, C, 6, 6
    for row in range(rows):
        patch = patches[:, row].permute(3, 4, 1, 0, 2)  # 6, 6, columns, T, C
        tiles[:, row].flatten(1).copy_(quick_linear(forth.to(x_THWC), patch.reshape(side * side, -1).t()))
    return tiles.flatten(1, 2)


@cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """(kernel [36, 9], input [36, 36], result [16, 36]): each the product of its two sides, in float32."""
    sides = _cook_toom(TILE, TAPS, POINTS)
    kernel, forth, back = (torch.kron(side, side).float() for side in sides)
    return kernel, forth, back


def _cook_toom(num_out: int, taps: int, points: Sequence[Fraction]) -> tuple[Tensor, Tensor, Tensor]:
    """The three matrices of one side in float64: kernel [n, taps], input [n, n], result [num_out, n]."""
    n = num_out + taps - 1
    scales = [prod((p - q for q in points if q != p), start=Fraction(1)) for p in points]
    kernel = [[p**i / scale for i in range(taps)] for p, scale in zip(points, scales, strict=True)]
    kernel.append([Fraction(i == taps - 1) for i in range(taps)])
    forth = [_polynomial([q for q in points if q != p]) for p in points] + [_polynomial(points)]
    back = [[*(p**i for p in points), Fraction(i == num_out - 1)] for i in range(num_out)]
    padded = [[*row, *[Fraction(0)] * (n - len(row))] for row in forth]
    kernel_t, forth_t, back_t = (
        torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
        for rows in (kernel, padded, back)
    )
    return kernel_t, forth_t, back_t


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - root), the constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        raised, same = [Fraction(0), *coefficients], [*coefficients, Fraction(0)]
        coefficients = [a - root * b for a, b in zip(raised, same, strict=True)]
    return coefficients
