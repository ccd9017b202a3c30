"""Position tables: layout, rules and what rotation must preserve."""

from __future__ import annotations

import math

import pytest
import torch

from cogvideox_diff.positions import (
    fitted_box,
    rope_angles,
    rope_coordinates,
    rotate,
    sincos_table,
    timestep_embedding,
)

GRID = (2, 3, 4)


def token(t: int, y: int, x: int) -> int:
    return (t * GRID[1] + y) * GRID[2] + x


def test_sincos_layout() -> None:
    """Time, then column, then row; sines before cosines; rows and columns divided by the scale."""
    dim = 32
    table = sincos_table(GRID, dim, scale=1.875)
    assert table.shape == (24, dim)
    code = table[token(1, 2, 3)]
    assert code[0] == pytest.approx(math.sin(1))
    assert code[4] == pytest.approx(math.cos(1))
    assert code[8] == pytest.approx(math.sin(3 / 1.875))
    assert code[14] == pytest.approx(math.cos(3 / 1.875))
    assert code[20] == pytest.approx(math.sin(2 / 1.875))
    assert code[21] == pytest.approx(math.sin(2 / 1.875 * 10000 ** (-1 / 6)))


def test_slice_coordinates_are_integers() -> None:
    t, y, x = rope_coordinates(GRID, (1, 5, 5), "slice")
    assert [t.tolist(), y.tolist(), x.tolist()] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"\(3, 4\) exceed .* \(5, 3\)"):
        rope_coordinates(GRID, (1, 5, 3), "slice")


def test_linspace_at_the_native_size_is_the_integer_grid() -> None:
    native, sliced = (rope_coordinates((13, 30, 45), (13, 30, 45), rule) for rule in ("linspace", "slice"))
    for a, b in zip(native, sliced, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "box"),
    [((30, 45), ((0, 30), (0, 45))), ((45, 30), ((0, 30), (12, 32))), ((15, 45), ((8, 23), (0, 45)))],
)
def test_fitted_box(size: tuple[int, int], box: tuple) -> None:
    assert fitted_box(size, (30, 45)) == box


def test_quirk_rope_linspace_stop() -> None:
    """An off-centre box is not divided evenly: its last point is stop * (n-1)/n."""
    _, y, x = rope_coordinates((1, 45, 30), (13, 30, 45), "linspace")
    assert x[0] == 12
    assert x[-1].item() == pytest.approx(32 * 29 / 30)
    assert y[-1].item() == pytest.approx(30 * 44 / 45)


def test_rope_angle_layout() -> None:
    coordinates = rope_coordinates(GRID, GRID, "slice")
    angles = rope_angles(coordinates, 64)
    assert angles.shape == (24, 32)
    assert angles[token(1, 2, 3), [0, 8, 20]].tolist() == [1, 2, 3]
    assert angles[token(1, 2, 3), 9].item() == pytest.approx(2 * 10000 ** (-2 / 24))


def test_rotation_keeps_lengths_and_depends_on_differences() -> None:
    angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1])
    rope = (angles.cos(), angles.sin())
    q, k = torch.randn(1, 1, 1, 4).expand(1, 1, 6, 4), torch.randn(1, 1, 1, 4).expand(1, 1, 6, 4)
    turned_q, turned_k = rotate(q, rope), rotate(k, rope)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = (turned_q @ turned_k.mT)[0, 0]
    for offset in range(6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert torch.equal(turned_q[:, :, 0], q[:, :, 0])  # angle 0


def test_rotation_turns_pairs_of_neighbours() -> None:
    rope = (torch.zeros(1, 2), torch.ones(1, 2))  # a quarter turn
    assert rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), rope).tolist() == [[-2, 1, -4, 3]]


def test_timestep_embedding() -> None:
    code = timestep_embedding(torch.tensor([0.0, 2.5]), 8)
    assert code[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert code[1, 0].item() == pytest.approx(math.cos(2.5))
    assert code[1, 5].item() == pytest.approx(math.sin(2.5 * 10000**-0.25))
