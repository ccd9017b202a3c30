"""Work side by side: everything is done once, alone, without gradients; errors arrive."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
import torch

from shared.memory import peak_bytes
from shared.threads import side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_piece_is_done_once(threads: int, count: int) -> None:
    done = []
    side_by_side(done.append, count)
    assert sorted(done) == list(range(count))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("inference", [False, True])
def test_a_piece_computes_alone_in_the_mode_of_its_caller(threads: int, inference: bool) -> None:
    alone, modes = set(), set()
    with torch.inference_mode(inference), torch.no_grad():
        filled = torch.zeros(4)

        def work(i: int) -> None:
            filled[i] = i  # an inference tensor may be changed in its own mode only
            alone.add(torch.get_num_threads())
            modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

        side_by_side(work, 4)
    assert filled.tolist() == [0, 1, 2, 3]
    assert alone == {1} and modes == {(False, inference)}


def test_an_error_arrives(threads: int) -> None:
    def work(i: int) -> None:
        if i == 3:
            raise ValueError("no third")

    with pytest.raises(ValueError, match="no third"):
        side_by_side(work, 5)


def test_a_fork_makes_its_own_threads(threads: int) -> None:
    """The threads of the parent are not there."""
    side_by_side(lambda i: None, 4)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=side_by_side, args=(lambda i: None, 4))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_memory_is_counted_wherever_it_is_made(threads: int) -> None:
    kept = []
    assert peak_bytes(lambda: side_by_side(lambda i: kept.append(torch.zeros(1000)), 4)) == 16000
    assert torch.get_num_threads() == threads
