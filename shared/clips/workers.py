"""Processes that read clips ahead of need, and how the death of one is told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from shared.errors import UserError


def started(loader: DataLoader) -> Iterator[Any]:
    """iter(loader), that tells a worker's death when the next item is asked for. Else torch's handler of
    SIGCHLD raises wherever this process happens to be: in an import, while a thread starts."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if before is not None:  # else not set by Python
        signal.signal(signal.SIGCHLD, before)
    return items


def told(items: Iterator[Any]) -> Iterator[Any]:
    """The items; UserError where a worker died."""
    try:
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"{str(error).splitlines()[0]} while reading clips (too little memory?); what is finished "
            "stays; run it again, or with fewer --num_workers"
        ) from error
