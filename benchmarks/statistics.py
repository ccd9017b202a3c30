"""Intervals over prompts. Every function takes one value per prompt, because prompts are what is independent:
several videos of one prompt are averaged first.

Means get percentile bootstrap intervals (Efron 1979). A proportion at 0 or 1 gets the Wilson interval (1927),
since resampling equal values would claim certainty. One number for a whole set (a distance between sets) gets
a jackknife interval: resampling repeats videos, and repeated videos inflate such a distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
GROUPS = 32  # of prompts that the jackknife leaves out in turn


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval; `n` counts prompts."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def by_prompt(pairs: Iterable[tuple[int, float]]) -> list[float]:
    """Mean value per prompt from (prompt index, value), in order of the index."""
    groups: dict[int, list[float]] = {}
    for index, value in pairs:
        groups.setdefault(index, []).append(value)
    return [float(np.mean(groups[index])) for index in sorted(groups)]


def mean_interval(
    values: Sequence[float],
    *,
    proportion: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Mean of the values with a bootstrap percentile interval; Wilson for a proportion at 0 or 1.

    Raises ValueError when there are no values or one is not finite.
    """
    data = _checked(values)
    value, n = float(data.mean()), len(data)
    if proportion and value in (0.0, 1.0):
        low, high = wilson(value * n, n, level=level)
    else:
        low, high = _bootstrap(data, seed, resamples, level)
    return Interval(value=value, low=min(low, value), high=max(high, value), n=n)


def wilson(successes: float, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval for `successes` of `n`."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, weight = successes / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * (share * (1 - share) / n + weight / (4 * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    proportion: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Mean of `first - second`, prompt by prompt, with a bootstrap percentile interval over prompts.

    Equal differences of proportions get what Wilson allows: n prompts without a disagreement leave room for a
    share of `1 - low` of them. Raises ValueError when the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values must be as many: {len(first)} and {len(second)}")
    differences = _checked([a - b for a, b in zip(first, second, strict=True)])
    value, n = float(differences.mean()), len(differences)
    if proportion and bool((differences == value).all()):
        room = wilson(0, n, level=level)[1]
        span = 2 * room if abs(value) == 1 else room  # one prompt that turned round moves the mean by 2 / n
        low, high = max(-1.0, value - span), min(1.0, value + span)
    else:
        low, high = _bootstrap(differences, seed, resamples, level)
    return Interval(value=value, low=min(low, value), high=max(high, value), n=n)


@dataclass(frozen=True, kw_only=True)
class Jackknife:
    """A statistic of a whole set, and of the set without each group of its members in turn (Quenouille 1956,
    Tukey 1958)."""

    value: float
    without: np.ndarray  # [groups]
    shares: np.ndarray  # of the members that a group holds, [groups]
    n: int

    def minus(self, other: Jackknife) -> Jackknife:
        """The difference, group by group; both must be of the same members."""
        if self.n != other.n or not np.array_equal(self.shares, other.shares):
            raise ValueError(f"paired statistics must be of the same members: {self.n} and {other.n}")
        value, without = self.value - other.value, self.without - other.without
        return Jackknife(value=value, without=without, shares=self.shares, n=self.n)

    def interval(self, *, level: float = LEVEL) -> Interval:
        """With Student's t of groups - 1 degrees of freedom. It is for what the statistic would be on other
        sets of the same size: a bias that depends on the size stays in it."""
        variance = float(((1 - self.shares) * np.square(self.without - self.without.mean())).sum())
        half = student_t(0.5 + level / 2, len(self.without) - 1) * variance**0.5
        return Interval(value=self.value, low=self.value - half, high=self.value + half, n=self.n)


def jackknife(
    statistic: Callable[[np.ndarray], float], count: int, *, groups: int = GROUPS, seed: int = 0
) -> Jackknife:
    """Of a `statistic` of the indices 0..count - 1. ValueError for fewer than three."""
    if count < 3:
        raise ValueError(f"a jackknife needs three values or more, got {count}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    parts = np.array_split(order, min(groups, count))
    without = np.array([statistic(np.setdiff1d(order, part)) for part in parts])
    shares = np.array([len(part) / count for part in parts])
    return Jackknife(value=statistic(np.arange(count)), without=without, shares=shares, n=count)


def student_t(share: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion around the normal (Abramowitz & Stegun 26.7.5); within 1 %
    from four degrees of freedom on."""
    z = NormalDist().inv_cdf(share)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def normal_p(value: float, low: float, high: float, *, level: float = LEVEL) -> float:
    """Two-sided p of "the true value is 0" that belongs to an interval, as if the estimate were normal."""
    half = (high - low) / 2 / NormalDist().inv_cdf(0.5 + level / 2)
    if half <= 0:
        return 0.0 if value else 1.0
    return 2 * (1 - NormalDist().cdf(abs(value) / half))


def holm(p_values: Sequence[float], *, level: float = LEVEL) -> list[bool]:
    """Which differences stand when all are tested together (Holm 1979): the chance that any of those called
    is none stays below 1 - level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    stands = [False] * len(p_values)
    for rank, i in enumerate(order):
        if p_values[i] > (1 - level) / (len(p_values) - rank):
            break
        stands[i] = True
    return stands


def _checked(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not bool(np.isfinite(data).all()):
        raise ValueError(f"needs one finite value per prompt and at least one, got {list(values)}")
    return data


def _bootstrap(data: np.ndarray, seed: int, resamples: int, level: float) -> tuple[float, float]:
    rng = np.random.Generator(np.random.PCG64(seed))
    means = data[rng.integers(len(data), size=(resamples, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
