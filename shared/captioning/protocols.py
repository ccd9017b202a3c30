"""What the stages of captioning ask of whoever answers them.

An adapter implements the methods that it can. `recipe` tells, stage by stage, every setting that changes its
answers (and no secret): finished answers are kept under it, so another recipe asks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from shared.video import Video

Stage = Literal["short", "dense", "summary", "end_to_end", "upsample"]
Recipe = Mapping[str, Any]  # of what JSON can hold


@dataclass(frozen=True, kw_only=True)
class TimedCaption:
    """What the frame at `time` (seconds) shows."""

    time: float
    text: str


class Answering(Protocol):
    def recipe(self, stage: Stage) -> Recipe: ...


class ShortCaptioner(Answering, Protocol):
    def short(self, video: Video) -> str:
        """One sentence on what happens."""
        ...


class DenseCaptioner(Answering, Protocol):
    def dense(self, image: Tensor) -> str:
        """All that a frame, uint8 [H, W, 3], shows."""
        ...


class Summariser(Answering, Protocol):
    def summarise(self, short: str, captions: Sequence[TimedCaption]) -> str:
        """One long caption of a clip from its short one and those of its frames."""
        ...


class EndToEndCaptioner(Answering, Protocol):
    def end_to_end(self, video: Video, prompt: str) -> str:
        """The long caption straight from the video, asked for by `prompt`."""
        ...


class PromptWriter(Answering, Protocol):
    def upsample(self, prompt: str, image: Tensor | None = None) -> str:
        """A long description, as training captions are, for a user's few words; with the first frame, uint8
        [H, W, 3], of how it goes on."""
        ...
