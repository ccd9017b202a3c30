"""Counts of a real forward, for tests of the cost model. Not a test file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
    return sdpa_flop(tuple(q.shape), tuple(k.shape), tuple(v.shape))


def _cpu_linear(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _cpu_weighted_rows(table: Tensor, places: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * places.numel() * table.shape[1]


for count in (_cpu_attention, _cpu_linear, _cpu_weighted_rows):
    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes
MISSING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.mkldnn._linear_pointwise: _cpu_linear,
    torch.ops.aten._embedding_bag: _cpu_weighted_rows,
    torch.ops.aten._embedding_bag_forward_only: _cpu_weighted_rows,
}


@torch.no_grad()
def counted_flops(run: Callable[[], object]) -> int:
    """By torch's own counter, which does not know the CPU's own kernels."""
    with FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
        run()
    return counter.get_total_flops()
