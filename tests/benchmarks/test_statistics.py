"""Intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.metrics.frechet import frechet_distance
from benchmarks.statistics import (
    by_prompt,
    holm,
    jackknife,
    mean_interval,
    normal_p,
    paired_difference,
    student_t,
    wilson,
)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(300, 40))
    intervals = [mean_interval(list(sample), seed=i, resamples=600) for i, sample in enumerate(samples)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.97  # a skewed sample of 40 costs the percentile method a few points


@pytest.mark.parametrize("kind", ["normal", "uniform", "exponential"])
def test_intervals_cover_the_truth_in_93_to_97_percent(kind: str) -> None:
    """1500 samples of 200 prompts; the share's own error is 0.6 points."""
    rng = np.random.default_rng(7)
    samples, truth = {
        "normal": (rng.normal(3, 2, size=(1500, 200)), 3.0),
        "uniform": (rng.uniform(size=(1500, 200)), 0.5),
        "exponential": (rng.exponential(size=(1500, 200)), 1.0),
    }[kind]
    intervals = [mean_interval(x, seed=i, resamples=400) for i, x in enumerate(samples)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.93 <= covered <= 0.97


def test_intervals_of_proportions_and_of_paired_differences_cover_too() -> None:
    rng = np.random.default_rng(8)
    shown = rng.random((1000, 100, 2)) < [0.6, 0.5]
    shown[:, :, 1] |= shown[:, :, 0] & (rng.random((1000, 100)) < 0.3)  # prompts make models alike
    truth = 0.6 - (0.5 + 0.5 * 0.6 * 0.3)
    shares = [mean_interval(x[:, 0], proportion=True, seed=i, resamples=400) for i, x in enumerate(shown)]
    assert 0.93 <= np.mean([s.low <= 0.6 <= s.high for s in shares]) <= 0.97
    floats = shown.astype(float)
    pairs = [
        paired_difference(x[:, 0], x[:, 1], proportion=True, seed=i, resamples=400)
        for i, x in enumerate(floats)
    ]
    assert 0.93 <= np.mean([p.low <= truth <= p.high for p in pairs]) <= 0.97


def test_jackknife_intervals_of_distances_cover_the_distance_at_their_size() -> None:
    rng = np.random.default_rng(9)

    def sets() -> np.ndarray:
        return rng.normal(size=(2, 48, 6)) * [[[1.0]], [[1.4]]] + [[[0.0]], [[0.5]]]

    truth = np.mean([frechet_distance(*sets()) for _ in range(1500)])
    found = []
    for _ in range(250):
        a, b = sets()
        found.append(jackknife(lambda i, a=a, b=b: frechet_distance(a[i], b[i]), 48, groups=16).interval())
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert 0.91 <= covered <= 0.98  # 250 simulations: the share's own error is 1.4 points


def test_jackknife_of_a_mean_is_the_standard_error() -> None:
    x = np.random.default_rng(3).normal(size=20)
    interval = jackknife(lambda i: float(x[i].mean()), 20).interval()
    half = student_t(0.975, 19) * x.std(ddof=1) / 20**0.5
    assert interval.value == pytest.approx(x.mean())
    assert interval.high - interval.value == pytest.approx(half)
    grouped = jackknife(lambda i: float(x[i].mean()), 20, groups=5)
    assert len(grouped.without) == 5 and grouped.shares.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="three values or more, got 2"):
        jackknife(lambda i: 0.0, 2)


def test_paired_statistics_must_be_of_the_same_members() -> None:
    first, second = (jackknife(lambda i: float(i.sum()), n) for n in (10, 11))
    assert first.minus(first).interval().high == 0.0
    with pytest.raises(ValueError, match="same members: 10 and 11"):
        first.minus(second)


def test_student_t_known_values() -> None:
    for freedom, value in ((4, 2.776), (9, 2.262), (31, 2.040), (1000, 1.962)):
        assert student_t(0.975, freedom) == pytest.approx(value, rel=0.01)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # Holm's own kind of example
    assert holm([0.04, 0.04]) == [False, False] and holm([0.04]) == [True] and holm([]) == []


def test_holm_keeps_the_chance_of_any_false_call() -> None:
    rng = np.random.default_rng(4)
    called = [any(holm(list(rng.uniform(size=10)))) for _ in range(2000)]
    assert np.mean(called) < 0.065


def test_p_of_an_interval() -> None:
    assert normal_p(1.96, 0.0, 3.92) == pytest.approx(0.05, abs=1e-3)
    assert normal_p(0.0, -1.0, 1.0) == 1.0 and normal_p(1.0, 1.0, 1.0) == 0.0


def test_paired_bootstrap_finds_small_differences_that_the_prompts_share() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.normal(size=30) * 10
    first, second = prompts + 0.5 + rng.normal(size=30) * 0.2, prompts
    difference = paired_difference(list(first), list(second))
    assert difference.excludes_zero and difference.low < 0.5 < difference.high
    unpaired = [mean_interval(list(x)) for x in (first, second)]
    assert unpaired[0].low < unpaired[1].high  # without pairing the prompts' spread hides it


def test_intervals_are_the_same_for_the_same_seed() -> None:
    values = list(np.random.default_rng(2).normal(size=20))
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_wilson_known_values() -> None:
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 4) == pytest.approx((0.0, 0.4899), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_proportion_at_its_end_is_not_certain(share: float) -> None:
    interval = mean_interval([share] * 4, proportion=True)
    assert interval.value == share
    assert interval.high - interval.low == pytest.approx(0.4899, abs=1e-4)
    assert interval.low <= share <= interval.high


@pytest.mark.parametrize(("first", "second"), [([1] * 6, [1] * 6), ([1] * 6, [0] * 6), ([0] * 6, [1] * 6)])
def test_equal_paired_differences_are_not_certain(first: list[float], second: list[float]) -> None:
    interval = paired_difference(first, second, proportion=True)
    assert interval.low < interval.high
    assert -1 <= interval.low <= interval.value <= interval.high <= 1


def test_unanimous_disagreement_of_many_prompts_excludes_zero() -> None:
    assert paired_difference([1] * 12, [0] * 12, proportion=True).excludes_zero
    assert not paired_difference([1] * 3, [0] * 3, proportion=True).excludes_zero


def test_videos_of_one_prompt_are_averaged_first() -> None:
    assert by_prompt([(1, 0.0), (0, 1.0), (1, 1.0), (1, 1.0)]) == pytest.approx([1.0, 2 / 3])


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), 1.0]])
def test_values_that_have_no_mean_are_errors(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite value per prompt"):
        mean_interval(values)


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="as many: 2 and 1"):
        paired_difference([1, 2], [1])
