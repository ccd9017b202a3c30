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

from shared.cpu_linear import quick_linear
from shared.threads import side_by_side

TILE = 4  # places of the result along each side
HALO = 2  # more of the input
TAPS = 3  # frames that a result sees
# Places where the polynomials are compared, beside infinity. 1 and 2 are usual and round twice as much.
POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))


def transform_kernel(weight_OCtHW: Tensor) -> Tensor:
    """[O, C, 3, 3, 3] -> [36, O, 3 * C] in float32, frames outside, channels inside."""
    kernel, _, _ = _matrices()
    spread = weight_OCtHW.transpose(1, 2).reshape(-1, 9).float()  # (O t C) x (H W)
    return quick_linear(kernel, spread).view(len(kernel), weight_OCtHW.shape[0], -1)


def convolve(
    x_THWC: Tensor, kernel: Tensor, bias_O: Tensor | None, out_THWO: Tensor, *, add: bool = False
) -> None:
    """Convolve frames with a border of one place and two frames in front, [T + 2, 4h + 2, 4w + 2, C] in
    float32, into `out_THWO` [T, H, W, O] of any type (`add`: to what is there), with a kernel of
    `transform_kernel`. H and W may be less than 4h and 4w."""
    _, _, back = _matrices()
    rows, columns = ((n - HALO) // TILE for n in x_THWC.shape[1:3])
    num_frames, height, width, channels = out_THWO.shape
    products = _multiply(_transform_tiles(x_THWC, rows, columns), kernel).view(len(kernel), rows, -1)
    bias = torch.zeros(()) if bias_O is None else bias_O.float()

    def put(row: int) -> None:
        places = quick_linear(back, products[:, row].contiguous().t())
        places = places.view(TILE, TILE, columns, num_frames, channels).permute(3, 0, 2, 1, 4)
        result = out_THWO[:, TILE * row : TILE * (row + 1)]
        if add:
            places += bias
        if width % TILE:
            places = places.flatten(2, 3)[:, :, :width]
        else:
            result = result.unflatten(2, (columns, TILE))
        places = places[:, : height - TILE * row]
        _ = result.add_(places) if add else torch.add(places, bias, out=result)

    side_by_side(put, -(-height // TILE))


def _multiply(tiles: Tensor, kernel: Tensor) -> Tensor:
    """[36, places, T + 2, C] and [36, O, 3 * C] -> [36, places * T, O]."""
    num_windows = tiles.shape[1] * (tiles.shape[2] - TAPS + 1)
    products = torch.empty(len(kernel), num_windows, kernel.shape[1], dtype=torch.float32)

    def multiply(i: int) -> None:
        windows = tiles[i].unfold(1, TAPS, 1).transpose(2, 3).flatten(2).flatten(0, 1)
        products[i] = quick_linear(windows, kernel[i])

    side_by_side(multiply, len(kernel))
    return products


def _transform_tiles(x_THWC: Tensor, rows: int, columns: int) -> Tensor:
    """[36, rows * columns, T + 2, C]."""
    _, forth, _ = _matrices()
    side = TILE + HALO
    patches = x_THWC.unfold(1, side, TILE).unfold(2, side, TILE)  # T, rows, columns, C, 6, 6
    patches = patches.permute(4, 5, 1, 2, 0, 3).reshape(side * side, -1)
    return quick_linear(forth, patches.t()).view(len(forth), rows * columns, *x_THWC.shape[::3])


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
