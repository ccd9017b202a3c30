"""The metrics: recipes, and one pure function for each. Nets that need weights are in `benchmarks.features`.

To add a metric of one video: a file with METRICS and `measure(video, prompt) -> {name: value}`, and its line
in VIDEO_METRICS. To add a distance: its line in `distances.SET_METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.metrics import (
    clip_scores,
    cost,
    diagnostics,
    distances,
    dynamics,
    motion,
    prompt_accuracy,
    reconstruction,
    temporal_consistency,
)
from benchmarks.metrics.base import Metric, RefusedError, digest
from shared.video import Video

__all__ = ["METRICS", "VIDEO_METRICS", "Metric", "RefusedError", "digest"]

VideoMetric = Callable[[Video, str], dict[str, float]]

VIDEO_METRICS: dict[str, VideoMetric] = {
    prompt_accuracy.NAME: prompt_accuracy.measure,
    motion.NAME: motion.measure,
    temporal_consistency.NAME: temporal_consistency.measure,
    dynamics.NAME: dynamics.measure,
}
METRICS: dict[str, Metric] = {
    metric.name: metric
    for module in (
        prompt_accuracy,
        motion,
        temporal_consistency,
        dynamics,
        clip_scores,
        distances,
        reconstruction,
        diagnostics,
        cost,
    )
    for metric in module.METRICS
}
