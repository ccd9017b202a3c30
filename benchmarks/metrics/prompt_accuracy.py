"""Does the video show what the prompt asked for? The oracle of the shapes world reads it from the frames."""

from __future__ import annotations

from benchmarks.metrics.base import Metric, RefusedError
from shared.clips import shapes
from shared.video import Video

NAME = "prompt_accuracy"
BORDERS = {
    "min_overlap": shapes.MIN_OVERLAP,
    "min_presence": shapes.MIN_PRESENCE,
    "still_below_px": shapes.STILL_BELOW,
    "quick_above_px": shapes.QUICK_ABOVE,
    "fps": shapes.FPS,
}


def _attribute(name: str) -> Metric:
    return Metric(
        name=f"{NAME}/{name}",
        title=name.capitalize(),
        recipe=f"share of prompts naming a {name} whose video shows that {name} to the shapes oracle",
        proportion=True,
        parameters=BORDERS,
    )


METRICS = (
    Metric(
        name=NAME,
        title="Prompt accuracy",
        recipe="share of prompts whose video shows every attribute that the prompt names and holds one valid "
        "object (overlap with the ideal shape above 0.7, there in 80 % of frames); shapes oracle",
        proportion=True,
        parameters=BORDERS,
    ),
    *(_attribute(name) for name in shapes.ATTRIBUTES),
    Metric(
        name=f"{NAME}/valid",
        title="Valid object",
        recipe="share of videos that hold one object of a known shape (overlap above 0.7) in 80 % of frames",
        proportion=True,
        parameters=BORDERS,
    ),
)


def measure(video: Video, prompt: str) -> dict[str, float]:
    """1.0 or 0.0 for each attribute the prompt names, for a valid object, and for all of them together.

    Raises RefusedError where the oracle's answer would mean nothing: a prompt of another world, another rate.
    """
    wanted = wanted_attributes(prompt)
    if video.fps != shapes.FPS and wanted.keys() & {"motion", "speed"}:
        raise RefusedError(
            f"the oracle tells slow from quick at {shapes.FPS:g} frames per second, not {video.fps:g}"
        )
    if video.num_frames < 2 and wanted.keys() & {"motion", "speed"}:
        raise RefusedError("a single frame shows no motion")
    reading = shapes.read(video)
    right = reading.agrees(wanted)
    values = {f"{NAME}/{name}": float(agreed) for name, agreed in right.items()}
    return {
        NAME: float(reading.valid and all(right.values())),
        **values,
        f"{NAME}/valid": float(reading.valid),
    }


def wanted_attributes(prompt: str) -> dict[str, str]:
    """What the prompt asks for. Raises RefusedError unless it names a shape: "a red car" must not pass on its
    colour."""
    wanted = shapes.parse(prompt)
    if "shape" not in wanted:
        raise RefusedError(f"the prompt names none of the oracle's shapes ({', '.join(shapes.SHAPES)})")
    return wanted
