"""The two-step draw, guidance, and clusters of a codebook."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideo_ar.sampling import CogLMSampler, cluster_codebook, draw_index, draw_uniforms, guide
from shared.errors import OutputCheckError

VOCAB = 30


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def logits(rows: int) -> Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(7))


def labels(clusters: int = 6) -> Tensor:
    return torch.randint(clusters, (VOCAB,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[None, 6], ids=["tokens", "clusters"])
def sampler(request: pytest.FixtureRequest) -> CogLMSampler:
    table = labels(request.param) if request.param else None
    return CogLMSampler(table, temperature=1.1, top_k=4, temperature2=0.7)


def by_hand(
    row: list[float], table: list[int], temperature: float, top_k: int, temperature2: float
) -> list[float]:
    """The formula with plain numbers, one row."""
    z = [value / temperature for value in row]
    total = sum(math.exp(value) for value in z)
    mass = {label: 0.0 for label in table}
    for value, label in zip(z, table, strict=True):
        mass[label] += math.exp(value) / total
    kept = sorted(mass, key=mass.__getitem__, reverse=True)[:top_k]
    inside = {
        label: sum(math.exp(v / temperature2) for v, other in zip(z, table, strict=True) if other == label)
        for label in kept
    }
    whole = sum(mass[label] for label in kept)
    return [
        mass[label] / whole * math.exp(v / temperature2) / inside[label] if label in kept else 0.0
        for v, label in zip(z, table, strict=True)
    ]


def test_probabilities_are_the_formula(sampler: CogLMSampler) -> None:
    table = list(range(VOCAB)) if sampler.order_V is None else labels().tolist()
    settings = (sampler.temperature, sampler.top_k, sampler.temperature2)
    expected = [by_hand(row, table, *settings) for row in logits(3).tolist()]
    torch.testing.assert_close(sampler.probabilities(logits(3)), torch.tensor(expected, dtype=torch.float64))


def test_every_token_gets_its_share_of_a_grid(sampler: CogLMSampler) -> None:
    """Evenly spread uniforms: the shares equal the probabilities to the grid's width."""
    side = 300
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    uniforms = torch.cartesian_prod(axis, axis)
    row = logits(1)
    tokens = sampler.sample(row.expand(len(uniforms), -1), uniforms)
    shares = tokens.bincount(minlength=VOCAB) / len(uniforms)
    torch.testing.assert_close(shares.double(), sampler.probabilities(row)[0], atol=3 / side, rtol=0)


def test_a_row_does_not_depend_on_its_batch(sampler: CogLMSampler) -> None:
    rows = logits(40)
    together = sampler.sample(rows, generators(40))
    alone = [sampler.sample(rows[i : i + 1], [g]).item() for i, g in enumerate(generators(40))]
    assert together.tolist() == alone
    assert len(set(alone)) > 5
    backwards = sampler.sample(rows.flip(0), generators(40)[::-1])
    assert torch.equal(backwards.flip(0), together)


def test_generators_and_their_uniforms_are_the_same(sampler: CogLMSampler) -> None:
    uniforms = draw_uniforms(generators(5))
    assert torch.equal(sampler.sample(logits(5), generators(5)), sampler.sample(logits(5), uniforms))


def test_own_clusters_equal_no_clusters() -> None:
    """Single-token clusters: temperature2 has nothing to choose from, and the draw is plain top-k."""
    own = CogLMSampler(torch.arange(VOCAB), top_k=5, temperature2=0.5)
    none = CogLMSampler(None, top_k=5, temperature2=2.0)
    torch.testing.assert_close(own.probabilities(logits(4)), none.probabilities(logits(4)))
    assert torch.equal(own.sample(logits(50), generators(50)), none.sample(logits(50), generators(50)))


def test_edges_of_the_unit_interval(sampler: CogLMSampler) -> None:
    row = logits(1).expand(4, -1)
    almost = 1 - 2**-53
    uniforms = torch.tensor([[0, 0], [0, almost], [almost, 0], [almost, almost]], dtype=torch.float64)
    tokens = sampler.sample(row, uniforms)
    assert (sampler.probabilities(row).gather(1, tokens[:, None]) > 0).all()


def test_invalid_tokens_and_empty_clusters_are_never_drawn() -> None:
    table = torch.tensor([0, 0, 5, 5, 7, 7])  # numbers 1..4 and 6 have no token
    sampler = CogLMSampler(table, top_k=100, invalid=[(1, 2), (4, None)])
    row = torch.tensor([[0.0, 50.0, 1.0, 1.0, 50.0, 50.0]])
    probabilities = sampler.probabilities(row)[0]
    assert (probabilities > 0).tolist() == [True, False, True, True, False, False]
    assert probabilities.sum().item() == pytest.approx(1)
    assert set(sampler.sample(row.expand(200, -1), generators(200)).tolist()) == {0, 2, 3}


def test_sharp_settings_do_not_underflow() -> None:
    sampler = CogLMSampler(torch.tensor([0, 0, 1, 1]), temperature=1e-3, temperature2=1e-3, top_k=2)
    row = torch.tensor([[5.0, 4.0, -5.0, 4.5]])
    assert sampler.sample(row.expand(20, -1), generators(20)).tolist() == [0] * 20
    assert sampler.probabilities(row).isfinite().all()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 13, VOCAB - 1])
@pytest.mark.parametrize("table", [None, labels()])
def test_logits_that_are_not_finite(table: torch.Tensor | None, place: int, odd: float) -> None:
    """Even where the odd one would not be drawn; the draw before it is told stays within the tokens."""
    rows = logits(3)
    rows[1, place] = odd
    with pytest.raises(OutputCheckError, match="image logits"):
        CogLMSampler(table).sample(rows, generators(3))
    nothing = torch.full((3, VOCAB), torch.nan, dtype=torch.float64)
    drawn = CogLMSampler(table)._draw(nothing, draw_uniforms(generators(3)))
    assert ((drawn >= 0) & (drawn < VOCAB)).all()


def test_a_draw_waits_once(sampler: CogLMSampler) -> None:
    with Waits() as waits:
        sampler.sample(logits(3), draw_uniforms(generators(3)))
    assert waits.count == 1


class Waits(TorchDispatchMode):
    """Counts the numbers that Python asks for: on a device each is waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_logits_are_left_alone(sampler: CogLMSampler) -> None:
    row = logits(2).double()
    before = row.clone()
    CogLMSampler(None, temperature=1.0, invalid=[(0, 5)]).sample(row, generators(2))
    sampler.sample(row, generators(2))
    assert torch.equal(row, before)


def test_guidance() -> None:
    cond, uncond = logits(2), logits(2).flip(1)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 3.0), 3 * cond - 2 * uncond)


def test_clusters_find_separate_clouds() -> None:
    draws = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(8, 5, generator=draws)
    points = (centres[:, None] + 0.1 * torch.randn(8, 15, 5, generator=draws)).flatten(0, 1)
    found = cluster_codebook(points, 8, seed=1).reshape(8, 15)
    assert (found == found[:, :1]).all()
    assert found[:, 0].unique().numel() == 8


def test_clusters_are_repeatable_and_local() -> None:
    """The result is a fixed point of k-means: no row is nearer to another cluster's mean."""
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    found = cluster_codebook(rows, 12, seed=5, max_rounds=200)
    assert torch.equal(found, cluster_codebook(rows, 12, seed=5, max_rounds=200))
    assert not torch.equal(found, cluster_codebook(rows, 12, seed=6, max_rounds=200))
    means = torch.stack([rows[found == label].mean(0) for label in range(12)])
    assert torch.equal(torch.cdist(rows, means).argmin(1), found)


@pytest.mark.parametrize("num_clusters", [1, 10, 20])
def test_no_cluster_is_empty_even_among_equal_rows(num_clusters: int) -> None:
    rows = torch.ones(20, 3)
    assert cluster_codebook(rows, num_clusters, seed=0).unique().tolist() == [*range(num_clusters)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CogLMSampler(None, temperature=0.0), "temperature must be positive"),
        (lambda: CogLMSampler(None, temperature2=float("inf")), "temperature2"),
        (lambda: CogLMSampler(None, top_k=0), "top_k must be at least 1, got 0"),
        (lambda: CogLMSampler(torch.zeros(4)), "labels must be integers"),
        (lambda: CogLMSampler(torch.tensor([0, -1])), "labels must be integers"),
        (
            lambda: CogLMSampler(labels()).sample(logits(1)[:, :9], generators(1)),
            "30 cluster labels .* 9 tokens",
        ),
        (lambda: CogLMSampler(None).sample(logits(1)[0], generators(1)), "logits must be"),
        (lambda: CogLMSampler(None).sample(logits(2), generators(1)), "randomness must be"),
        (lambda: cluster_codebook(torch.zeros(3, 2), 4, seed=0), "num_clusters must lie in 1..3"),
    ],
)
def test_illegal_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_second_draw_is_by_the_cluster_as_a_whole_row_has_it():
    """`sample` looks at one cluster alone, be it small or large; `_within` at every token."""
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(9, (60,), generator=generator) ** 2
    sampler = CogLMSampler(labels)
    z_BV = sampler._scaled(torch.randn(50, 60, generator=generator) * 3)
    uniform_B = torch.rand(50, generator=generator, dtype=torch.float64)
    cluster_B = labels[torch.randint(60, (50,), generator=generator)]
    wanted = draw_index(sampler._within(z_BV, cluster_B), uniform_B)
    assert torch.equal(sampler._draw_within(z_BV, cluster_B, uniform_B), wanted)
