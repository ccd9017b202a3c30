"""Intervals over prompts. Every function takes one value per prompt, because prompts are what is independent:
several videos of one prompt are averaged first.

Means get percentile bootstrap intervals (Efron 1979). A proportion at 0 or 1 gets the Wilson interval (1927),
since resampling equal values would claim certainty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95


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
