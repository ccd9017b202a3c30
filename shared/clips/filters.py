"""Clips that are good enough to train on: bounds on what was measured of them."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared.clips.dataset import CAPTION_FIELDS, VIDEO_FIELDS
from shared.clips.measures import Measured
from shared.errors import SettingError
from shared.files import atomic_path

SCORES = "scores"  # field of a written list
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


def caption_words(text: str) -> int:
    """Words between spaces; a Chinese or Japanese character counts as one."""
    return len(WORD.findall(text))


VALUES: dict[str, Callable[[Measured], float]] = {
    "motion": lambda m: m.measures.motion,
    "cuts": lambda m: len(m.measures.cuts),
    "aspect": lambda m: m.measures.aspect,
    "caption_words": lambda m: caption_words(m.clip.caption),
    "fps": lambda m: m.measures.fps,
    "height": lambda m: m.measures.height,
    "width": lambda m: m.measures.width,
    "frames": lambda m: m.measures.num_frames,
    "seconds": lambda m: m.measures.seconds,
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A clip is kept where every value lies within; None is no bound. Motion is in frame heights per second,
    aspect is width over height, sizes are pixels."""

    min_motion: float | None = None
    max_motion: float | None = None
    max_cuts: int | None = None
    min_aspect: float | None = None
    max_aspect: float | None = None
    min_caption_words: int | None = None
    max_caption_words: int | None = None
    min_fps: float | None = None
    max_fps: float | None = None
    min_height: int | None = None
    min_width: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in VALUES:
            low, high = (getattr(self, f"{end}_{name}", None) for end in ("min", "max"))
            if low is not None and high is not None and low > high:
                raise SettingError(f"min_{name} {low} is above max_{name} {high}")

    def given(self) -> dict[str, float]:
        """The bounds that there are."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: bound for name, bound in every.items() if bound is not None}

    def broken(self, item: Measured) -> list[str]:
        """Names of the bounds that the clip does not keep; "unreadable" for a file without measures."""
        if item.measures.problem:
            return ["unreadable"]
        return [name for name, bound in self.given().items() if not _kept(name, bound, item)]


def _kept(name: str, bound: float, item: Measured) -> bool:
    end, _, value = name.partition("_")
    got = VALUES[value](item)
    return (got >= bound if end == "min" else got <= bound) or math.isclose(got, bound)


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What became of a list."""

    kept: tuple[Measured, ...]
    dropped: tuple[tuple[Measured, tuple[str, ...]], ...]  # with the bounds that each breaks

    def summary(self) -> dict[str, Any]:
        reasons = Counter(name for _, broken in self.dropped for name in broken)
        rows = [
            {"number": m.clip.number, "video": m.clip.name, "reasons": list(broken)}
            | ({"problem": m.measures.problem} if m.measures.problem else {})
            for m, broken in self.dropped
        ]
        return {
            "num_clips": len(self.kept) + len(self.dropped),
            "num_kept": len(self.kept),
            "reasons": dict(reasons.most_common()),
            "dropped": rows,
        }


def apply_bounds(measured: Sequence[Measured], bounds: Bounds) -> Filtered:
    """SettingError where nothing is left; it names the bound that most clips break."""
    broken = [(item, tuple(bounds.broken(item))) for item in measured]
    result = Filtered(
        kept=tuple(item for item, names in broken if not names),
        dropped=tuple((item, names) for item, names in broken if names),
    )
    if not result.kept:
        name, count = next(iter(result.summary()["reasons"].items()))
        raise SettingError(f"none of {len(measured)} clips is left; {count} of them fail {name}")
    return result


def write_list(kept: Sequence[Measured], path: Path, *, overwrite: bool = False) -> Path:
    """A metadata.jsonl of the kept clips: original files (by paths relative to `path`), captions,
    other fields as they were, and what was measured as "scores"."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        rows = [_row(item, path.parent) for item in kept]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
    return path


def _row(item: Measured, folder: Path) -> dict[str, Any]:
    clip = item.clip
    name = Path(os.path.relpath(clip.video.absolute(), folder.absolute())).as_posix()
    head = {VIDEO_FIELDS[0]: name, CAPTION_FIELDS[0]: clip.caption}
    return head | dict(clip.fields) | {SCORES: item.measures.scores()}
