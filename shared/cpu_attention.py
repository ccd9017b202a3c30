"""Attention on the CPU: many queries as products of blocks, few of them as sums at the rate of the memory.

torch's own kernel works in float32 whatever the dtype, and by MKL. 9 rows of 8 heads with 400 queries and 433
keys take it 36 ms on one thread of a Zen 5; products, head by head, take 24 in float32, by oneDNN, and 18 in
bfloat16.

With few queries, a product of so few rows and a matrix reads at a half to a third of the rate that the memory
gives (on one thread of a Zen 5 15 to 28 GB/s in float32, 9 to 14 in bfloat16). Both of attention's are sums
of rows by weight: values by the weights of their keys, and columns of keys by the numbers of the query. That
is an embedding bag: rows of a table, weighted, with the next ones fetched ahead, by FBGEMM, which torch has
in it on x86 (28 to 43 GB/s and 16 to 33). Rounding differs from a product's.

Legend: B rows, N heads, P few and L many queries, S keys, D head dim, C blocks of K columns.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from shared.cpu_linear import has_quick_bfloat16, has_quick_linear, quick_linear, takes_own_paths

BLOCK_ROWS = 512  # queries at once
FEWEST_SCORES = 2**16  # of a head, below which the number of operators counts
COLUMNS = 64  # of a block of keys
WEIGHTED_SUM = 0  # the mode's number
CPU = torch.device("cpu")  # whatever the default is: what is kept must be there


def takes_blocks(q_BNLD: Tensor, k_BNSD: Tensor) -> bool:
    """Whether `attend_in_blocks` may be called, and pays."""
    if not takes_own_paths(q_BNLD) or q_BNLD.shape[2] * k_BNSD.shape[2] < FEWEST_SCORES:
        return False
    return has_quick_linear(q_BNLD) or (q_BNLD.dtype == torch.bfloat16 and has_quick_bfloat16())


def attend_in_blocks(q_BNLD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Softmax attention [B, N, L, D], stored by query; `bias` (broadcasts to [B, 1, L, S]) is added to the
    scores."""
    rows, heads, length, dim = q_BNLD.shape
    out_BLND = q_BNLD.new_empty(rows, length, heads, dim)
    biases = [None] * rows if bias is None else bias.expand(rows, 1, length, k_BNSD.shape[2])[:, 0]
    scaled = q_BNLD * dim**-0.5
    for row, bias_LS in enumerate(biases):
        k_NSD, v_NDS = k_BNSD[row].contiguous(), v_BNSD[row].mT.contiguous()
        for head in range(heads):  # one by one: a head's scores stay in the cache
            for first in range(0, length, BLOCK_ROWS):
                part = slice(first, first + BLOCK_ROWS)
                scores = quick_linear(scaled[row, head, part], k_NSD[head])
                if bias_LS is not None:
                    scores += bias_LS[part]
                out_BLND[row, part, head] = quick_linear(scores.softmax(-1), v_NDS[head])
    return out_BLND.transpose(1, 2)


def has_bags(like: Tensor) -> bool:
    """Whether tensors of this kind may be summed so: without gradients, and not within torch.compile."""
    return takes_own_paths(like) and bags_take(like.dtype)


@cache
def bags_take(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has them for a dtype."""
    return dtype in (torch.float32, torch.bfloat16) and "fbgemm" in torch.backends.quantized.supported_engines


def weighted_rows(weights_BNPS: Tensor, v_BNSD: Tensor) -> Tensor:
    """`weights @ v` [B, N, P, D]."""
    dim, strides = v_BNSD.shape[3], v_BNSD.stride()
    whole_rows = strides[2:] == (dim, 1) and strides[0] % dim == 0 and strides[1] % dim == 0
    if not (has_bags(v_BNSD) and weights_BNPS.dtype == v_BNSD.dtype and whole_rows and weights_BNPS.numel()):
        return weights_BNPS @ v_BNSD
    rows, heads, queries, keys = weights_BNPS.shape
    steps = (strides[0] // dim, strides[1] // dim)
    places, starts = _places_of_values(rows, heads, queries, keys, *steps)
    return _bags(v_BNSD, places, starts, weights_BNPS).view(rows, heads, queries, dim)


def column_scores(q_BNPD: Tensor, keys_BNCDK: Tensor, num_keys: int) -> Tensor:
    """`q @ k.mT` [B, N, P, num_keys] of keys that lie in columns, `COLUMNS` to a block."""
    rows, heads, queries, dim = q_BNPD.shape
    blocks = num_blocks(num_keys)
    steps = (keys_BNCDK.stride(0) // COLUMNS, keys_BNCDK.stride(1) // COLUMNS)
    places, starts = _places_of_columns(rows, heads, queries, blocks, dim, *steps)
    weights = q_BNPD[:, :, None].expand(rows, heads, blocks, queries, dim)
    sums = _bags(keys_BNCDK, places, starts, weights).view(rows, heads, blocks, queries, COLUMNS)
    return sums.transpose(2, 3).flatten(3)[..., :num_keys]


def num_blocks(keys: int) -> int:
    """Blocks of columns that hold so many keys."""
    return -(-keys // COLUMNS)


def _bags(first: Tensor, places: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Of every bag the sum of its rows by weight; they are counted from `first` on."""
    width = first.shape[-1]
    held = first.untyped_storage().nbytes() // first.itemsize - first.storage_offset()
    table = first.as_strided((held // width, width), (width, 1))
    return torch.embedding_bag(table, places, starts, False, WEIGHTED_SUM, False, weights.reshape(-1))[0]


@lru_cache(maxsize=32)  # all layers of a step ask for the same few, of every slot of a wave
def _places_of_values(
    rows: int, heads: int, queries: int, keys: int, row_step: int, head_step: int
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # whoever asks next may want them outside of it
        first_BN = _first(rows, heads, row_step, head_step)
        places_BN1S = first_BN[:, :, None, None] + torch.arange(keys, device=CPU)
        places = places_BN1S.expand(-1, -1, queries, -1)
        return places.flatten().int(), _starts(rows * heads * queries, keys)


@lru_cache(maxsize=32)
def _places_of_columns(
    rows: int, heads: int, queries: int, blocks: int, dim: int, row_step: int, head_step: int
) -> tuple[Tensor, Tensor]:
    """A block's queries behind one another, so that it is read once."""
    with torch.inference_mode(False):
        first_BN = _first(rows, heads, row_step, head_step)
        places_BNCD = first_BN[:, :, None, None] + torch.arange(blocks * dim, device=CPU).view(blocks, dim)
        places = places_BNCD[:, :, :, None].expand(-1, -1, -1, queries, -1)
        return places.flatten().int(), _starts(rows * heads * blocks * queries, dim)


def _first(rows: int, heads: int, row_step: int, head_step: int) -> Tensor:
    first_B, first_N = (torch.arange(size, device=CPU) for size in (rows, heads))
    return first_B[:, None] * row_step + first_N * head_step


def _starts(bags: int, size: int) -> Tensor:
    return torch.arange(bags, dtype=torch.int32, device=CPU) * size
