"""Independent pieces of work on the CPU side by side: each on a thread whose torch computes alone.

torch divides single operators among its threads. Where an operator takes some tens of microseconds, as the
products of a tiled convolution do, waking them costs as much as they save.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier

import torch


def side_by_side(work: Callable[[int], None], count: int) -> None:
    """`work(i)` for all i below `count`, without gradients, on as many threads as torch has; calls must not
    depend on one another. The first error that one of them raises is raised here."""
    threads, inference = max(1, min(torch.get_num_threads(), count)), torch.is_inference_mode_enabled()

    def part(first: int) -> None:
        # inference_mode(False) turns gradients on, so no_grad comes second
        with torch.inference_mode(inference), torch.no_grad():
            for i in range(first, count, threads):
                work(i)

    if threads == 1:
        part(0)
        return
    pool = _pool(torch.get_num_threads(), os.getpid())
    parts = [pool.submit(part, i) for i in range(threads)]
    wait(parts)
    for done in parts:
        done.result()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork has none of its parent's."""
    pool, ready = ThreadPoolExecutor(threads, "side_by_side", initializer=_alone), Barrier(threads)
    for waiting in [pool.submit(ready.wait) for _ in range(threads)]:
        waiting.result()
    # `_alone` also changed the process-wide default for later threads: restore it
    torch.set_num_threads(threads)
    return pool


def _alone() -> None:
    """Limit this Python thread to one OpenMP thread; torch overwrites a thread's first setting when it first
    asks, hence twice."""
    torch.set_num_threads(1)
    torch.get_num_threads()
    torch.set_num_threads(1)
