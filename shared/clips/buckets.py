"""Sizes that clips are trained in: each goes to one of a few legal sizes, and a batch holds one size only.

Legend of a size: frames x height x width, the last two in pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from shared.errors import SettingError

Rule = Literal["aspect", "size"]


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """One size."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @staticmethod
    def parse(text: str) -> Bucket:
        """The inverse of `str`: "49x480x720"."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if not match or not all(int(part) for part in match.groups()):
            raise SettingError(f"a size reads FRAMESxHEIGHTxWIDTH, as in 49x480x720, got {text!r}")
        frames, height, width = map(int, match.groups())
        return Bucket(num_frames=frames, height=height, width=width)

    @property
    def aspect(self) -> float:
        return self.width / self.height


def parse_buckets(texts: Iterable[str]) -> tuple[Bucket, ...]:
    """Different sizes in a fixed order, whatever the order they are given in."""
    return tuple(sorted({Bucket.parse(text) for text in texts}))


def assign(
    num_frames: int, height: int, width: int, buckets: Sequence[Bucket], rule: Rule = "aspect"
) -> Bucket:
    """The bucket of a clip: the largest frame count that is not above the clip's, then among those sizes
    "aspect": the one whose aspect is nearest (least is cut away), then the nearest size; "size": the nearest
    |dh| + |dw|, as in the released bucket sampler, then the nearest aspect (to a large clip an upright and a
    lying size are as near as each other).

    SettingError where the clip has fewer frames than every bucket."""
    if rule not in get_args(Rule):
        raise SettingError(f"the rule must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    fitting = [bucket for bucket in buckets if bucket.num_frames <= num_frames]
    if not fitting:
        least = min((bucket.num_frames for bucket in buckets), default=0)
        raise SettingError(f"a clip of {num_frames} frames is too short: the shortest size has {least}")
    most = max(bucket.num_frames for bucket in fitting)
    aspect = width / height

    def apart(bucket: Bucket) -> tuple[float, ...]:
        of_aspect = round(abs(math.log(bucket.aspect / aspect)), 6)
        of_size = abs(bucket.height - height) + abs(bucket.width - width)
        pair = (of_aspect, of_size) if rule == "aspect" else (of_size, of_aspect)
        return (*pair, bucket.height, bucket.width)

    return min((bucket for bucket in fitting if bucket.num_frames == most), key=apart)


def losses(height: int, width: int, bucket: Bucket) -> dict[str, Any]:
    """What making a clip fit costs: the share of its picture that is cut away, and by how much it grows
    (above 1: it is enlarged)."""
    scale = max(bucket.height / height, bucket.width / width)
    kept = (bucket.height * bucket.width) / (scale * height * scale * width)
    return {"cut_away": round(1 - kept, 4), "scale": round(scale, 4)}
