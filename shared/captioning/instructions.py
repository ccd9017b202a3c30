"""What language models are told, and the questions put together from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from shared.captioning.protocols import TimedCaption

Role = Literal["system", "user", "assistant"]

SHORT = "These pictures are frames of one video clip, in order. Say in one short sentence what happens in it."
DENSE = (
    "Describe this picture completely: every object with its colour, material, position and posture, the "
    "surroundings, the light, the style. Say only what can be seen, in plain sentences, without a list."
)
SUMMARY = (
    "You write captions for video clips you cannot see. You are given one short caption of the whole clip "
    "and descriptions of single frames with their times in seconds. Write one paragraph of at most 200 words "
    "that describes the clip as a whole: what is there, how it looks, what moves and what changes from the "
    "first frame to the last, and how the camera moves. Where frame descriptions contradict each other, "
    "believe what most of them say. Invent nothing, and mention neither frames nor descriptions nor times."
)
END_TO_END = "Describe in detail what this video shows and how it changes over time."
UPSAMPLE = (
    "You turn a few words into the text for a video generator, whose training captions were long. Keep "
    "everything the user names, and keep its meaning. Add what a viewer would see: looks, colours, "
    "surroundings, light, the course of the motion, the camera. Answer in English with a single paragraph of "
    "80 to 150 words, and with nothing but this paragraph."
)
UPSAMPLE_IMAGE = (
    "You are shown the first frame of a video that is to be generated, and a few words on what is to "
    "happen. Write the text for a video generator: say briefly what the frame shows, then how the scene "
    "moves on from it in one continuous shot, without a cut and without another point of view. Keep all that "
    "the user names. Answer in English with a single paragraph of 60 to 120 words, and with nothing but this "
    "paragraph."
)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation; `images` uint8 [H, W, 3] come before its text."""

    role: Role
    text: str
    images: tuple[Tensor, ...] = ()


def summary_messages(short: str, captions: Sequence[TimedCaption]) -> list[Message]:
    """The question of the summary; also what a distilled summariser is trained on."""
    frames = [f"Frame at {caption.time:g} s: {one_line(caption.text)}" for caption in captions]
    text = "\n".join([f"Short caption: {one_line(short)}", *frames])
    return [Message(role="system", text=SUMMARY), Message(role="user", text=text)]


def upsample_messages(prompt: str, image: Tensor | None) -> list[Message]:
    system = UPSAMPLE if image is None else UPSAMPLE_IMAGE
    images = () if image is None else (image,)
    return [Message(role="system", text=system), Message(role="user", text=prompt, images=images)]


def one_line(text: str) -> str:
    return " ".join(text.split())


def whole_sentences(text: str) -> str:
    """Without the last sentence where that was cut off; as it is where no sentence is whole."""
    text = text.rstrip()
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|[。！？]", text)]
    return text[: ends[-1]] if ends else text
