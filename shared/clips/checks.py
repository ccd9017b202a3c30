"""What is wrong with a list of clips, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.clips.measures import MOMENTS, Measured, Measures, signature_values
from shared.errors import SettingError

ADVICE: Mapping[str, str] = {
    "missing": "correct its path in the list, or remove the line",
    "unreadable": "get or encode the file again (ffmpeg -i OLD -c:v libx264 NEW.mp4), or remove the line",
    "short": "remove the line, or train with fewer frames",
    "static": "remove the line unless its caption says that nothing moves; it teaches still videos",
    "duplicate": "remove all but one of the lines; copies are learnt by heart",
    "near_duplicate": "look at both, and remove one unless they differ in what matters",
    "empty_caption": "write a caption, or remove the line; training drops captions by itself",
}
KINDS = tuple(ADVICE)


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """Where a clip becomes a bad one."""

    min_frames: int = 5
    min_seconds: float = 0.0
    static_below: float = 0.5  # grey levels of 255 by which some frame must differ from the first, on average
    near_levels: float = 2.0  # mean difference of two signatures that still are the same clip

    def __post_init__(self) -> None:
        if self.min_frames < 1:
            raise SettingError(f"min_frames must be at least 1, got {self.min_frames}")
        for name in ("min_seconds", "static_below", "near_levels"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with one clip; `counts` unless the caller allows its kind."""

    kind: str
    number: int
    video: str
    detail: str
    counts: bool = True

    @property
    def advice(self) -> str:
        return ADVICE[self.kind]

    def row(self) -> dict[str, Any]:
        plain = {"kind": self.kind, "number": self.number, "video": self.video, "detail": self.detail}
        return plain | {"advice": self.advice, "counts": self.counts}


def find_faults(
    measured: Sequence[Measured], settings: CheckSettings, allowed: Sequence[str] = ()
) -> list[Finding]:
    """Everything that is wrong, in the order of the list; kinds in `allowed` are told but do not count."""
    if illegal := [kind for kind in allowed if kind not in ADVICE]:
        raise SettingError(f"unknown kind of fault {illegal[0]!r}; legal: {', '.join(KINDS)}")
    found = [*_each(measured, settings), *_copies(measured), *_near_copies(measured, settings.near_levels)]
    order = {kind: place for place, kind in enumerate(KINDS)}
    return [
        Finding(
            kind=kind,
            number=item.clip.number,
            video=item.clip.name,
            detail=detail,
            counts=kind not in allowed,
        )
        for kind, item, detail in sorted(found, key=lambda f: (f[1].clip.number, order[f[0]]))
    ]


def report(measured: Sequence[Measured], findings: Sequence[Finding]) -> dict[str, Any]:
    """JSON: how many clips, how many of them bad, how often which fault, and every finding."""
    bad = {finding.number for finding in findings if finding.counts}
    counts = Counter(finding.kind for finding in findings)
    return {
        "ok": not bad,
        "num_clips": len(measured),
        "num_bad": len(bad),
        "counts": {kind: counts[kind] for kind in KINDS if counts[kind]},
        "findings": [finding.row() for finding in findings],
    }


_Fault = tuple[str, Measured, str]


def _each(measured: Sequence[Measured], settings: CheckSettings) -> Iterator[_Fault]:
    """Faults that a clip has alone."""
    for item in measured:
        if not item.clip.caption:
            yield "empty_caption", item, "the caption is empty"
        if item.measures.problem:
            missing = not item.clip.video.exists()
            yield "missing" if missing else "unreadable", item, item.measures.problem
        else:
            yield from _of_measures(item, item.measures, settings)


def _of_measures(item: Measured, values: Measures, settings: CheckSettings) -> Iterator[_Fault]:
    few = values.num_frames < settings.min_frames
    if few or values.seconds < settings.min_seconds:
        wanted = f"{settings.min_frames} frames" if few else f"{settings.min_seconds:g} s"
        yield "short", item, f"{values.num_frames} frames in {values.seconds:.2f} s; at least {wanted}"
    if values.num_frames > 1 and values.change < settings.static_below:
        yield (
            "static",
            item,
            f"no frame differs from the first by more than {values.change:.2f} of 255 levels",
        )


def _copies(measured: Sequence[Measured]) -> Iterator[_Fault]:
    first: dict[str, Measured] = {}
    for item in measured:
        if item.key and first.setdefault(item.key, item) is not item:
            other = first[item.key].clip
            yield "duplicate", item, f"the same bytes as clip {other.number} ({other.name})"


def _near_copies(measured: Sequence[Measured], levels: float) -> Iterator[_Fault]:
    """Clips whose signature is near that of an earlier one with other bytes.

    Means of two signatures, over all or over each moment and colour, differ by no more than the signatures
    do. So of clips sorted by their mean only neighbours within `levels` are looked at, and only those in full
    whose colours are as near: none is missed."""
    seen: set[str] = set()
    alive = [m for m in measured if m.measures.signature and not (m.key in seen or seen.add(m.key))]
    if len(alive) < 2:
        return
    values = np.stack([signature_values(item.measures.signature) for item in alive])
    coarse = values.reshape(len(values), MOMENTS, -1, 3).mean(axis=2).reshape(len(values), -1)
    means = coarse.mean(axis=1)
    order = np.argsort(means, kind="stable")
    ends = np.searchsorted(means[order], means[order] + levels, side="right")
    nearest: dict[int, tuple[float, int]] = {}
    for place, end in enumerate(ends):
        for other, apart in _within(coarse, values, order[place], order[place + 1 : end], levels):
            later, earlier = max(order[place], other), min(order[place], other)
            nearest[later] = min(nearest.get(later, (np.inf, -1)), (apart, earlier))
    for later, (apart, earlier) in nearest.items():
        other = alive[earlier].clip
        yield "near_duplicate", alive[later], f"{apart:.2f} levels from clip {other.number} ({other.name})"


def _within(
    coarse: NDArray[np.float64],
    values: NDArray[np.int16],
    one: int,
    others: NDArray[np.int64],
    levels: float,
) -> Iterator[tuple[int, float]]:
    others = others[np.abs(coarse[others] - coarse[one]).mean(axis=1) <= levels]
    apart = np.abs(values[others] - values[one]).mean(axis=1)
    for other in np.flatnonzero(apart <= levels):
        yield int(others[other]), float(apart[other])


def lines(content: Mapping[str, Any]) -> list[str]:
    """The report in sentences: a line per finding, what to do about each kind, and a sum."""
    rows = content["findings"]
    told = [f"clip {row['number']} ({row['video']}): {row['kind']}: {row['detail']}" for row in rows]
    advice = [f"{kind} ({count}): {ADVICE[kind]}" for kind, count in content["counts"].items()]
    return [*told, *advice, f"{content['num_clips']} clips, {content['num_bad']} bad"]
