"""Everything that measures with a net, loaded once for a whole evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.features.extractors import Extractor, extractors
from benchmarks.features.files import FeatureFiles
from benchmarks.metrics import METRICS, VIDEO_METRICS, Metric, RefusedError, VideoMetric, clip_scores
from shared.errors import WeightsError
from shared.video import Video


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """`videos` measure one video, `nets` give features for distances, `lpips` compares two videos.

    `metrics` are all recipes with the files' checksums; `skipped` says of a metric why it is not measured.
    """

    metrics: dict[str, Metric] = field(default_factory=lambda: dict(METRICS))
    videos: dict[str, VideoMetric] = field(default_factory=lambda: dict(VIDEO_METRICS))
    nets: dict[str, Extractor] = field(default_factory=dict)
    lpips: Callable[[Video, Video], float] | None = None
    skipped: dict[str, str] = field(default_factory=dict)


def load_instruments(files: FeatureFiles, *, sets: bool = True) -> Instruments:
    """What the files allow; a file that cannot be read skips its metrics, with the reason. `sets` False
    leaves the nets of the distances out."""
    nets, broken = extractors(files) if sets else ({}, {})
    videos = dict(VIDEO_METRICS)
    lpips = None
    if (path := files.path("clip")) is not None:
        from benchmarks.features.clip import ClipScorer

        try:
            videos[clip_scores.NAME] = refusing(ClipScorer(path).measure)
        except WeightsError as error:
            broken["clip"] = str(error)
    if (path := files.path("lpips")) is not None:
        from benchmarks.features.lpips import load_lpips

        try:
            lpips = load_lpips(path)
        except WeightsError as error:
            broken["lpips"] = str(error)
    unread = {n: f"skipped: {broken[m.needs]}" for n, m in METRICS.items() if m.needs in broken}
    return Instruments(
        metrics=files.metrics(), videos=videos, nets=nets, lpips=lpips, skipped=files.skipped() | unread
    )


def refusing(measure: VideoMetric) -> VideoMetric:
    """A net that fails on a video refuses it, and the others go on."""

    def measured(video: Video, prompt: str) -> dict[str, float]:
        try:
            return measure(video, prompt)
        except (WeightsError, RuntimeError) as error:
            raise RefusedError(str(error).strip().splitlines()[-1]) from error

    return measured
