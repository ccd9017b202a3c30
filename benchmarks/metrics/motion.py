"""How fast the object moves, by the shapes oracle."""

from __future__ import annotations

from benchmarks.metrics.base import Metric, RefusedError
from benchmarks.metrics.prompt_accuracy import wanted_attributes
from shared.clips import shapes
from shared.video import Video

NAME = "motion"
SECONDS = (shapes.NUM_FRAMES - 1) / shapes.FPS
RANGES = {
    "still": (0.0, shapes.STILL_BELOW / SECONDS),
    **{speed: (low / SECONDS, high / SECONDS) for speed, (low, high) in shapes.TRAVEL.items()},
}

METRICS = (
    Metric(
        name=f"{NAME}/speed",
        title="Measured speed",
        recipe="speed of the object along the straight line through its centres, in pixels of a 64-pixel "
        "frame per second; shapes oracle, videos with a valid object only",
        unit="px/s",
        better="neither",
    ),
    Metric(
        name=f"{NAME}/speed_error",
        title="Speed error",
        recipe="distance of that speed from the range that the prompt's word stands for in the training "
        "clips, zero inside; videos with a valid object only",
        unit="px/s",
        better="lower",
        parameters={word: list(span) for word, span in RANGES.items()},
    ),
)


def measure(video: Video, prompt: str) -> dict[str, float]:
    """Speed, and its error where the prompt says how fast. Nothing for a video whose object is not valid: its
    speed would be noise. Raises RefusedError for a prompt of another world or a single frame."""
    wanted = wanted_attributes(prompt)
    if video.num_frames < 2:
        raise RefusedError("a single frame shows no motion")
    reading = shapes.read(video)
    if not reading.valid:
        return {}
    values = {f"{NAME}/speed": reading.velocity}
    word = "still" if wanted.get("motion") == "still" else wanted.get("speed")
    if word is not None:
        low, high = RANGES[word]
        values[f"{NAME}/speed_error"] = max(low - reading.velocity, reading.velocity - high, 0.0)
    return values
