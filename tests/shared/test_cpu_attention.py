"""Attention on the CPU by other operators is the same function."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from shared import cpu_attention
from shared.attention import attend
from shared.cpu_attention import COLUMNS, column_scores, weighted_rows
from shared.cpu_linear import has_quick_bfloat16


def given(dtype: torch.dtype, queries: int, used: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(queries * used)
    cache = torch.randn(2, 3, 4, 40, 16, generator=random).to(dtype)  # as of a cache: rows of a longer region
    weights = torch.randn(3, 4, queries, used, generator=random).softmax(-1).to(dtype)
    return weights, cache[1, :, :, 5 : 5 + used]


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("used", [1, 7, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_product(dtype: torch.dtype, queries: int, used: int) -> None:
    weights, v = given(dtype, queries, used)
    with torch.no_grad(), mock.patch.object(torch, "embedding_bag", wraps=torch.embedding_bag) as bags:
        torch.testing.assert_close(weighted_rows(weights, v), weights @ v)
        before = cpu_attention._places_of_values.cache_info().hits
        _, other = given(dtype, queries, used)
        other *= 2  # the same places of another table
        torch.testing.assert_close(weighted_rows(weights, other), weights @ other)
    if cpu_attention.bags_take(dtype):
        assert bags.call_count == 2 and cpu_attention._places_of_values.cache_info().hits == before + 1


def test_what_is_kept_is_the_cpus_whatever_the_default_device_is() -> None:
    weights, v = given(torch.float32, 2, 11)
    for given_places in (cpu_attention._places_of_values, cpu_attention._places_of_columns):
        given_places.cache_clear()
    with torch.no_grad(), torch.device("meta"):
        found = weighted_rows(weights, v)
    torch.testing.assert_close(found, weights @ v)
    with torch.no_grad():
        torch.testing.assert_close(weighted_rows(weights, v), weights @ v)


def test_what_cannot_be_a_table_is_a_product() -> None:
    weights, v = given(torch.float32, 2, 7)
    with torch.no_grad():
        product = weights @ v
        for other in (v.mT.contiguous().mT, torch.nn.functional.pad(v, (0, 3))[..., :16]):
            assert torch.equal(weighted_rows(weights, other), weights @ other)
        assert weighted_rows(weights.double(), v.double()).dtype == torch.float64
        assert weighted_rows(weights[:0], v[:0]).shape == (0, 4, 2, 16)
    weights.requires_grad_()
    weighted_rows(weights, v).sum().backward()
    assert weights.grad is not None and torch.equal(weighted_rows(weights, v), product)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("used", [1, COLUMNS, COLUMNS + 1, 3 * COLUMNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_columns_are_the_product(dtype: torch.dtype, queries: int, used: int) -> None:
    random = torch.Generator().manual_seed(used)
    keys = torch.randn(2, 3, 5, 8, COLUMNS, generator=random).to(dtype)[:, :, 1:]  # a region before it
    q = torch.randn(2, 3, queries, 8, generator=random).to(dtype)
    rows = keys.mT.flatten(2, 3)[:, :, :used]
    with torch.no_grad():
        torch.testing.assert_close(column_scores(q, keys, used), q @ rows.mT)


@pytest.mark.parametrize("bias_rows", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_blocks(
    dtype: torch.dtype, bias_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "BLOCK_ROWS", 7)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, size, 8, generator=random).to(dtype) for size in (17, 20, 20))
    bias = None if bias_rows is None else torch.randn(bias_rows, 1, 17, 20, generator=random).to(dtype)
    with torch.no_grad():
        got = cpu_attention.attend_in_blocks(q, k, v, bias=bias)
        wanted = attend(q.float(), k.float(), v.float(), bias=None if bias is None else bias.float())
    torch.testing.assert_close(got.float(), wanted, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_where_blocks_pay() -> None:
    q, k = torch.zeros(1, 1, 256, 4), torch.zeros(1, 1, 256, 4)
    assert not cpu_attention.takes_blocks(q, k)  # with gradients
    with torch.no_grad():
        assert cpu_attention.takes_blocks(q, k) == torch.backends.mkldnn.is_available()
        assert cpu_attention.takes_blocks(q.bfloat16(), k.bfloat16()) == has_quick_bfloat16()
        assert not cpu_attention.takes_blocks(q[:, :, :255], k)
        assert not cpu_attention.takes_blocks(q.double(), k.double())
        assert not cpu_attention.takes_blocks(q.to("meta"), k)
