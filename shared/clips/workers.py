"""Processes that read clips ahead of need, and how the death of one is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from shared.errors import UserError


def items_of(loader: DataLoader) -> Iterator[Any]:
    """The loader's items; its workers begin at once. UserError where a worker died, raised when the next
    item is asked for and nowhere else."""
    return _told(_started(loader))


def _started(loader: DataLoader) -> Iterator[Any]:
    """iter(loader), made beside the main thread: there torch would set a handler of SIGCHLD, that raises
    wherever the process happens to be, even while the next worker's queue starts. Without it torch asks
    every few seconds of waiting whether its workers live."""
    if loader.num_workers == 0:
        return iter(loader)
    made: list[Iterator[Any]] = []
    failed: list[Exception] = []

    def make() -> None:
        try:
            made.append(iter(loader))
        except Exception as error:
            failed.append(error)

    beside = threading.Thread(target=make, name="start workers", daemon=True)
    beside.start()
    beside.join()
    if failed:
        raise failed[0]
    return made[0]


def _told(items: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"{str(error).splitlines()[0]} while reading clips (too little memory?); what is finished "
            "stays; run it again, or with fewer --num_workers"
        ) from error
