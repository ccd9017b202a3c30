"""Sums of rows by weight, which is attention's second product for few queries, at the rate of the memory.

On the CPU a product of one row of weights and a matrix reads at half the rate that the memory gives (float32
19 to 21 GB/s on one thread of a Zen 5, bfloat16 14). The same sum is an embedding bag: rows of a table,
weighted, with the next ones fetched ahead, by FBGEMM, which torch has in it on x86 (32 to 43 and 20 to 30).

Legend: B rows, N heads, P queries, S keys, D head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WEIGHTED_SUM = 0  # the mode's number


def weighted_rows(weights_BNPS: Tensor, v_BNSD: Tensor) -> Tensor:
    """`weights @ v` [B, N, P, D]; rounding differs."""
    if not _applies(weights_BNPS, v_BNSD):
        return weights_BNPS @ v_BNSD
    rows, heads, queries, keys = weights_BNPS.shape
    dim = v_BNSD.shape[3]
    steps = v_BNSD.stride(0) // dim, v_BNSD.stride(1) // dim
    last = (rows - 1) * steps[0] + (heads - 1) * steps[1] + keys
    table = v_BNSD.as_strided((last, dim), (dim, 1))
    places, starts = _places(rows, heads, queries, keys, *steps)
    weights = weights_BNPS.reshape(-1)
    sums = torch.embedding_bag(table, places, starts, False, WEIGHTED_SUM, False, weights)[0]
    return sums.view(rows, heads, queries, dim)


def _applies(weights: Tensor, v: Tensor) -> bool:
    if v.device.type != "cpu" or v.dtype not in (torch.float32, torch.bfloat16) or weights.dtype != v.dtype:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not weights.numel():
        return False
    dim = v.shape[3]
    whole_rows = v.stride(3) == 1 and v.stride(2) == dim and v.stride(0) % dim == 0 and v.stride(1) % dim == 0
    return whole_rows and "fbgemm" in torch.backends.quantized.supported_engines


@lru_cache(maxsize=8)  # all layers of a step ask for the same few
def _places(
    rows: int, heads: int, queries: int, keys: int, row_step: int, head_step: int
) -> tuple[Tensor, Tensor]:
    """Which rows of the table every bag sums, and where in them it begins."""
    with torch.inference_mode(False):  # whoever asks next may want them outside of it
        first_BN = torch.arange(rows)[:, None] * row_step + torch.arange(heads) * head_step
        places = first_BN[:, :, None, None] + torch.arange(keys)
        places = places.expand(rows, heads, queries, keys).flatten().int()
        return places, torch.arange(rows * heads * queries, dtype=torch.int32) * keys
