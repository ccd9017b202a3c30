"""Every backend equals "math"."""

from __future__ import annotations

import pytest
import torch

from shared.attention import KERNELS, Backend, attend

RUNNABLE = ["sdpa", "math"]  # everywhere and with a bias


def inputs(length: int = 5, keys: int = 7) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 8, generator=rng, dtype=torch.float64) for n in (length, keys, keys)]


def biases() -> list[torch.Tensor | None]:
    rng = torch.Generator().manual_seed(1)
    mask = torch.zeros(5, 7, dtype=torch.float64).masked_fill(
        torch.rand(5, 7, generator=rng) < 0.4, -torch.inf
    )
    mask[:, 0] = 0
    return [None, torch.randn(2, 3, 5, 7, generator=rng, dtype=torch.float64), mask]


@pytest.mark.parametrize("backend", RUNNABLE)
@pytest.mark.parametrize("bias", biases())
def test_backends_agree_with_a_plain_loop(backend: Backend, bias):
    q, k, v = inputs()
    got = attend(q, k, v, bias=bias, backend=backend)
    full = torch.zeros(2, 3, 5, 7, dtype=torch.float64) if bias is None else bias.expand(2, 3, 5, 7)
    for b, n, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        scores = torch.stack([q[b, n, i] @ k[b, n, j] / 8**0.5 + full[b, n, i, j] for j in range(7)])
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(got[b, n, i], weights @ v[b, n])


@pytest.mark.parametrize("backend", RUNNABLE)
def test_an_excluded_key_has_no_influence(backend: Backend):
    q, k, v = inputs()
    bias = torch.zeros(5, 7, dtype=torch.float64)
    bias[:, 3] = -torch.inf
    before = attend(q, k, v, bias=bias, backend=backend)
    k[:, :, 3], v[:, :, 3] = 100.0, 100.0
    assert attend(q, k, v, bias=bias, backend=backend).equal(before)


def test_flash_without_a_bias():
    q, k, v = inputs()
    torch.testing.assert_close(attend(q, k, v, backend="flash"), attend(q, k, v, backend="math"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_of_a_gpu(backend: Backend):
    q, k, v = (torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    got, wanted = attend(q, k, v, backend=backend), attend(q.float(), k.float(), v.float(), backend="math")
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=5e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_agrees_with_math():
    pytest.importorskip("xformers")
    q, k, v = (x.float().cuda() for x in inputs(8, 8))
    bias = torch.randn(2, 3, 8, 8, device="cuda")
    for b in (None, bias):
        torch.testing.assert_close(
            attend(q, k, v, bias=b, backend="xformers"),
            attend(q, k, v, bias=b, backend="math"),
            atol=1e-5,
            rtol=1e-4,
        )


def test_an_unknown_backend_lists_the_legal_ones():
    with pytest.raises(ValueError, match="unknown attention backend 'fast'; legal: sdpa, math, xformers"):
        attend(*inputs(), backend="fast")  # type: ignore[arg-type]
