"""Explicit Uniform Sampling (CogVideoX paper section 3.2): who draws its timesteps from which interval.

The timesteps are cut into as many intervals as a step has micro-batches, over all data-parallel ranks and,
where one process takes several, over those too. A step's timesteps are then spread evenly whatever the draws,
so its loss moves less than that of independent draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.errors import SettingError

RELEASED_FROM_RANKS = 9  # the released code leaves the scheme off for up to 8 ranks


def interval(place: int, parts: int, num_timesteps: int = 1000, *, released: bool = False) -> range:
    """The timesteps of interval `place` of `parts`: together all intervals cover every timestep once.

    `released`: all of width num_timesteps // parts, so that the last timesteps may belong to none (of 16
    parts 992..999, the one without any signal among them).
    """
    if not 0 <= place < parts <= num_timesteps:
        raise ValueError(f"no interval {place} of {parts} in {num_timesteps} timesteps")
    if released:
        width = num_timesteps // parts
        return range(place * width, (place + 1) * width)
    return range(place * num_timesteps // parts, (place + 1) * num_timesteps // parts)


def rank_interval(
    rank: int, ranks: int, groups: int, num_timesteps: int = 1000, *, released: bool = False
) -> range:
    """The timesteps of a data-parallel rank where groups of ranks / groups ranks share an interval.

    `released` also gives every rank all timesteps where there are at most 8. SettingError unless the groups
    come out even.
    """
    if released and ranks < RELEASED_FROM_RANKS:
        return range(num_timesteps)
    if groups < 1 or ranks % groups:
        legal = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise SettingError(
            f"{groups} groups do not divide {ranks} ranks; legal: {', '.join(map(str, legal))}"
        )
    return interval(rank // (ranks // groups), groups, num_timesteps, released=released)


@dataclass(frozen=True)
class Share:
    """Micro-batch `place` of the `parts` that make up a step."""

    place: int
    parts: int

    @classmethod
    def of(cls, micro_step: int, accumulation: int) -> Share:
        """Of a micro-batch by its number over all steps, as objectives are given it. Ranks deal a step's
        micro-batches out, so its share is its own whichever rank takes it."""
        return cls(micro_step % accumulation, accumulation)

    def spread(self, size: int, rng: np.random.Generator, num_timesteps: int = 1000) -> npt.NDArray[np.int64]:
        """`size` timesteps in rising order, one from each of `size` equal parts of this share's interval."""
        own = interval(self.place, self.parts, num_timesteps)
        places = ((np.arange(size) + rng.random(size)) / size * len(own)).astype(np.int64)
        return own.start + np.minimum(places, len(own) - 1)  # a draw next to 1 may be rounded up to it


WHOLE = Share(0, 1)
