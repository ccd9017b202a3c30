"""The exchanges between processes: exact, with unequal sizes, in every dtype that models run in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.distributed import Launch, ParallelContext, all_to_all, exchange, gather_parts, started, sum_over
from tests.distributed.launch import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
WORLD = 3


def numbers(rank: int, other: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `rank` has for `other`: another size for every pair."""
    return (100 * rank + 10 * other + torch.arange(2 * (1 + rank + 2 * other))).view(2, -1).to(dtype)


def trade(world: ParallelContext) -> dict[str, Any]:
    ranks = range(world.degree)
    traded = {
        str(dtype): all_to_all(
            [numbers(world.rank, other, dtype) for other in ranks],
            [numbers(other, world.rank).shape for other in ranks],
            world,
        )
        for dtype in DTYPES
    }
    own = numbers(world.rank, world.rank)
    after, before = (world.rank + 1) % world.degree, (world.rank - 1) % world.degree
    ring = torch.empty(3)
    exchange(world, send={after: torch.full((3,), float(world.rank))}, receive={before: ring})
    halves = torch.full((2,), 0.1, dtype=torch.bfloat16)
    return {
        "traded": traded,
        "gathered": gather_parts(own, world),
        "gathered with known sizes": gather_parts(own, world, [numbers(r, r).shape for r in ranks]),
        "gathered with an empty one": gather_parts(own if world.rank else own.new_empty(0, 0), world),
        "ring": ring,
        "sum": sum_over(halves, world),
        "kept": halves,
        "transposed": sum_over(torch.arange(6.0).view(2, 3).T, world),
        "refused": refusal(world),
    }


def refusal(world: ParallelContext) -> str:
    with torch.enable_grad(), pytest.raises(RuntimeError) as refused:
        sum_over(torch.ones(1, requires_grad=True), world)
    return str(refused.value)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(trade, tmp_path_factory.mktemp("ranks"), world_size=WORLD)


@pytest.mark.distributed
def test_all_to_all(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        for dtype in DTYPES:
            got = result["traded"][str(dtype)]
            assert len(got) == WORLD
            for other, x in enumerate(got):
                assert x.dtype == dtype and torch.equal(x, numbers(other, rank, dtype))


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["gathered", "gathered with known sizes", "gathered with an empty one"])
def test_gather_unequal_parts(results: list[dict[str, Any]], case: str) -> None:
    for result in results:
        for rank, x in enumerate(result[case]):
            if rank == 0 and "empty" in case:
                assert x.shape == (0, 0)
            else:
                assert torch.equal(x, numbers(rank, rank))


@pytest.mark.distributed
def test_exchange_in_a_ring(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        assert result["ring"].tolist() == [float((rank - 1) % WORLD)] * 3


@pytest.mark.distributed
def test_sums_are_float32_and_leave_their_input(results: list[dict[str, Any]]) -> None:
    tenth = torch.tensor(0.1, dtype=torch.bfloat16)
    for result in results:
        assert torch.equal(result["sum"], tenth.float().expand(2) * WORLD)
        assert torch.equal(result["kept"], tenth.expand(2))
        assert torch.equal(result["transposed"], torch.arange(6.0).view(2, 3).T * WORLD)


@pytest.mark.distributed
def test_gradients_are_refused(results: list[dict[str, Any]]) -> None:
    assert all("no_grad" in result["refused"] for result in results)


def fail_on_one(world: ParallelContext) -> Tensor:
    if world.rank == 1:
        raise ValueError("one rank gives up")
    return sum_over(torch.ones(1), world)


@pytest.mark.distributed
def test_a_failing_rank_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one rank gives up"):
        run_ranks(fail_on_one, tmp_path)


def test_one_process_is_the_identity() -> None:
    alone, x = ParallelContext(), torch.arange(6.0).view(2, 3)
    assert torch.equal(all_to_all([x], [x.shape], alone)[0], x)
    assert torch.equal(gather_parts(x, alone)[0], x)
    assert torch.equal(sum_over(x, alone), x)
    exchange(alone)
    assert alone.split(1) == alone


@pytest.mark.distributed
def test_start_and_stop(tmp_path: Path) -> None:
    with started(Launch.from_file(tmp_path / "store", 0, 1), "gloo", timeout=10) as world:
        assert (world.rank, world.ranks) == (0, (0,))
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
