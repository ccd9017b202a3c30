"""How far raters agree, beyond what chance gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import Literal

Units = Sequence[Sequence[float]]  # for every thing that was rated, the ratings it got
Scale = Literal["nominal", "interval"]
DISTANCES: dict[Scale, Callable[[float, float], float]] = {
    "nominal": lambda a, b: float(a != b),
    "interval": lambda a, b: (a - b) ** 2,
}


def krippendorff_alpha(units: Units, *, scale: Scale = "interval") -> float | None:
    """Krippendorff's alpha: 1 for perfect agreement, 0 for what chance gives; any number of ratings per unit.

    None where no unit has two ratings, or all are one value. (Krippendorff, Content Analysis, chapter 11)
    """
    distance = DISTANCES[scale]
    rated = [unit for unit in units if len(unit) > 1]
    values = Counter(value for unit in rated for value in unit)
    count = sum(values.values())
    if count < 2 or len(values) < 2:
        return None
    observed = sum(sum(distance(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in rated)
    expected = sum(distance(a, b) * values[a] * values[b] for a, b in product(values, repeat=2))
    return 1 - (observed / count) / (expected / (count * (count - 1)))


def fleiss_kappa(units: Units) -> float | None:
    """Fleiss' kappa of nominal ratings (Fleiss 1971). None unless every unit has the same number, two or
    more, of ratings, and they are not all one value."""
    sizes = {len(unit) for unit in units}
    if len(sizes) != 1 or (raters := sizes.pop()) < 2:
        return None
    tables = [Counter(unit) for unit in units]
    shares = [count / (raters * len(units)) for count in sum(tables, Counter()).values()]
    chance = sum(share**2 for share in shares)
    if chance >= 1:
        return None
    agreed = [(sum(n * n for n in table.values()) - raters) / (raters * (raters - 1)) for table in tables]
    return (sum(agreed) / len(agreed) - chance) / (1 - chance)
