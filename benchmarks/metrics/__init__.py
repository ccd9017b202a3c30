"""The built-in metrics: one pure function of frames per file, none needs outside weights.

To add one: a file with METRICS and `measure(video, prompt) -> {name: value}`, and its line in VIDEO_METRICS.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.metrics import cost, motion, prompt_accuracy, reconstruction, temporal_consistency
from benchmarks.metrics.base import Metric, RefusedError, digest
from shared.video import Video

__all__ = ["METRICS", "VIDEO_METRICS", "Metric", "RefusedError", "digest"]

VideoMetric = Callable[[Video, str], dict[str, float]]

VIDEO_METRICS: dict[str, VideoMetric] = {
    prompt_accuracy.NAME: prompt_accuracy.measure,
    motion.NAME: motion.measure,
    temporal_consistency.NAME: temporal_consistency.measure,
}
METRICS: dict[str, Metric] = {
    metric.name: metric
    for module in (prompt_accuracy, motion, temporal_consistency, reconstruction, cost)
    for metric in module.METRICS
}
