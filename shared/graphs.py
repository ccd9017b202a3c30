"""CUDA graphs: work that is recorded once and started as a whole, without what the CPU does between kernels.

What is recorded reads and writes the same memory in every replay, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


def capture_cuda(
    run: Callable[[], Tensor], *, pool: Any = None, device: torch.device | None = None, warm_ups: int = 2
) -> tuple[Tensor, Replay]:
    """Record `run` as a graph: (its result, which every replay writes anew, replay). `pool` is memory that
    graphs share; they must not run at the same time. `device`: by default the current one. `warm_ups`: runs
    before; one suffices where `run` has run elsewhere."""
    index = None if device is None else device.index
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    side, present = side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(present)
    with torch.cuda.stream(side):  # libraries allocate and choose kernels in the first runs
        for _ in range(warm_ups):
            run()
    present.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side):
        result = run()
    return result, graph.replay


class SharedPool:
    """`capture_cuda` for several graphs in one pool of memory. A graph's result is lost when another runs."""

    def __init__(self, device: torch.device | None = None, *, warm_ups: int = 2) -> None:
        self.pool, self.device, self.warm_ups = None, device, warm_ups

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return capture_cuda(run, pool=self.pool, device=self.device, warm_ups=self.warm_ups)
