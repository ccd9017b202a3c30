"""Intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.statistics import by_prompt, mean_interval, paired_difference, wilson


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(300, 40))
    intervals = [mean_interval(list(sample), seed=i, resamples=600) for i, sample in enumerate(samples)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.97  # a skewed sample of 40 costs the percentile method a few points


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
