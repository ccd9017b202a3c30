"""CUDA graphs: work that is recorded once and started as a whole, without what the CPU does between kernels.

What is recorded reads and writes the same memory in every replay, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


def capture_cuda(run: Callable[[], Tensor], *, pool: Any = None) -> tuple[Tensor, Replay]:
    """Record `run` as a graph: (its result, which every replay writes anew, replay). `pool` is memory that
    graphs share; they must not run at the same time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate and choose kernels in the first runs
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return result, graph.replay


class SharedPool:
    """`capture_cuda` for several graphs in one pool of memory. A graph's result is lost when another runs."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return capture_cuda(run, pool=self.pool)
