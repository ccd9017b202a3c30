"""Every stage of captioning by conversation with a model, wherever that runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from shared.captioning import instructions
from shared.captioning.frames import MAX_FRAMES, FrameChoice, choose_frames
from shared.captioning.instructions import Message
from shared.captioning.protocols import Recipe, Stage, TimedCaption
from shared.errors import SettingError
from shared.video import Video


class ChatModel(Protocol):
    """`recipe` holds every setting that changes an answer."""

    @property
    def recipe(self) -> Recipe: ...

    def answer(self, messages: Sequence[Message]) -> str:
        """The model's turn after `messages`: some text. CaptionError where none comes."""
        ...


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Frames shown for a short caption (evenly over the clip), and for the end-to-end caption at most."""

    short_frames: int = 4
    max_frames: int = MAX_FRAMES
    frame_choice: FrameChoice = "seconds"

    def __post_init__(self) -> None:
        for name in ("short_frames", "max_frames"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")


class ChatCaptioner:
    """All protocols of `shared.captioning.protocols` with one model."""

    def __init__(self, model: ChatModel, settings: ChatSettings | None = None) -> None:
        self.model = model
        self.settings = settings or ChatSettings()

    def recipe(self, stage: Stage) -> Recipe:
        told = {
            "short": instructions.SHORT,
            "dense": instructions.DENSE,
            "summary": instructions.SUMMARY,
            "end_to_end": "",  # the caller's prompt, which is among the inputs
            "upsample": instructions.UPSAMPLE + instructions.UPSAMPLE_IMAGE,
        }
        frames = asdict(self.settings) if stage in ("short", "end_to_end") else {}
        return {**self.model.recipe, "instruction": told[stage], **frames}

    def short(self, video: Video) -> str:
        count = min(self.settings.short_frames, video.num_frames)
        chosen = [round((i + 0.5) * video.num_frames / count - 0.5) for i in range(count)]
        return self._look(instructions.SHORT, video, chosen)

    def dense(self, image: Tensor) -> str:
        return self.model.answer([Message(role="user", text=instructions.DENSE, images=(image,))])

    def summarise(self, short: str, captions: Sequence[TimedCaption]) -> str:
        return self.model.answer(instructions.summary_messages(short, captions))

    def end_to_end(self, video: Video, prompt: str) -> str:
        chosen = choose_frames(video, self.settings.frame_choice, self.settings.max_frames)
        return self._look(prompt, video, chosen)

    def upsample(self, prompt: str, image: Tensor | None = None) -> str:
        return self.model.answer(instructions.upsample_messages(prompt, image))

    def _look(self, text: str, video: Video, chosen: Sequence[int]) -> str:
        images = tuple(video.frames[i] for i in chosen)
        return self.model.answer([Message(role="user", text=text, images=images)])
