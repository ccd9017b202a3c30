"""A worker's death is told where its item is asked for, and nowhere else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event

import pytest
from torch.utils.data import DataLoader, Dataset

from shared.clips.workers import started, told
from shared.errors import UserError


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
    items = told(started(DataLoader(Mortal(may_die), batch_size=None, num_workers=1, prefetch_factor=4)))
    assert next(items) == 0
    assert signal.getsignal(signal.SIGCHLD) == before
    may_die.set()
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)  # torch's handler would raise here
    assert not multiprocessing.active_children()
    with pytest.raises(UserError, match=r"DataLoader worker .* while reading clips .* fewer --num_workers"):
        list(items)


def test_other_errors_stay_what_they_are() -> None:
    def failing():
        yield 1
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(told(failing()))
