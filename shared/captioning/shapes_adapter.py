"""Captions of the demo world by its oracle, which reads them off the pixels: the same for the same pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from shared.captioning.errors import CaptionError
from shared.captioning.protocols import Recipe, Stage, TimedCaption
from shared.clips import shapes
from shared.video import Video


class ShapesCaptioner:
    """All protocols of `shared.captioning.protocols`; CaptionError for what is not of this world."""

    def recipe(self, stage: Stage) -> Recipe:
        return {"adapter": "shapes", "version": 1}

    def short(self, video: Video) -> str:
        return _read(video).text

    def dense(self, image: Tensor) -> str:
        return _sentence(_read(Video(frames=image[None], fps=shapes.FPS)).image_text)

    def summarise(self, short: str, captions: Sequence[TimedCaption]) -> str:
        """The short caption, and what most frames show."""
        if not captions:
            raise CaptionError("no captions of frames to sum up")
        ((text, count),) = Counter(caption.text for caption in captions).most_common(1)
        share = "Every frame" if count == len(captions) else f"{count} of {len(captions)} frames"
        return f"{_sentence(short)} {share} shows {text[0].lower()}{text[1:]}"

    def end_to_end(self, video: Video, prompt: str) -> str:
        return _sentence(_read(video).text)

    def upsample(self, prompt: str, image: Tensor | None = None) -> str:
        """The prompt's attributes, and for those it leaves open the first frame's, or the simplest."""
        named = shapes.parse(prompt)
        if not {"colour", "shape"} <= named.keys() and image is None:
            raise CaptionError(f"{prompt!r} names no colour and shape of this world")
        seen = {} if image is None else _read(Video(frames=image[None], fps=shapes.FPS)).attributes()
        simplest = {"background": "black", "motion": "still"}
        values = simplest | seen | ({"motion": "still"} if "motion" not in named else {}) | named
        speed = None if values["motion"] == "still" else values.get("speed", "slowly")
        return shapes.Caption(
            colour=values["colour"],
            shape=values["shape"],
            motion=values["motion"],
            speed=speed,
            background=values["background"],
        ).text


def _read(video: Video) -> shapes.Caption:
    seen = shapes.read(video)
    if not seen.valid:
        raise CaptionError("the oracle sees none of its shapes")
    return shapes.Caption(
        colour=seen.colour, shape=seen.shape, motion=seen.motion, speed=seen.speed, background=seen.background
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
