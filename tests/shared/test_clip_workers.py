"""A worker's death is told where its item is asked for, and nowhere else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event

import pytest
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from shared.clips.workers import items_of
from shared.errors import UserError

DEATH = r"DataLoader worker .* while reading clips .* fewer --num_workers"


class Mortal(Dataset):
    """Numbers, until one whose reader dies; not before may_die, so that the numbers before it are there."""

    def __init__(self, may_die: Event):
        self.may_die = may_die

    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> int:
        if place == 3:
            self.may_die.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return place


def test_a_death_is_told_when_the_next_item_is_asked_for() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    may_die = multiprocessing.Event()
    items = items_of(DataLoader(Mortal(may_die), batch_size=None, num_workers=1, prefetch_factor=4))
    assert next(items) == 0
    assert signal.getsignal(signal.SIGCHLD) == before
    may_die.set()
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)  # torch's handler would raise here
    assert not multiprocessing.active_children()
    with pytest.raises(UserError, match=DEATH):
        list(items)


class Deadly(Sampler):
    """Places, the first of them not before a worker has died: that is while the loader still starts."""

    def __iter__(self) -> Iterator[int]:
        for worker in multiprocessing.active_children():
            worker.kill()
            os.waitid(os.P_PID, worker.ident, os.WEXITED | os.WNOWAIT)  # left to torch's handler to find
        yield from range(6)


def test_a_death_while_the_workers_start_is_told_then_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # torch sets its own only once
    numbers: list[int] = list(range(6))
    items = items_of(DataLoader(numbers, batch_size=None, sampler=Deadly(), num_workers=1))
    assert not multiprocessing.active_children()  # it is dead, and nothing was raised
    with pytest.raises(UserError, match=DEATH):
        list(items)


class Unusable(Sampler):
    def __iter__(self) -> Iterator[int]:
        yield 0
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_stay_what_they_are(num_workers: int) -> None:
    loader = DataLoader(list(range(6)), batch_size=None, sampler=Unusable(), num_workers=num_workers)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(items_of(loader))
