"""Generators that draw what a prompt says, in the shapes world: quick, and as right as they are told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shared.clips import shapes
from shared.protocol import GenerationRequest, GenerationResult, StageStats
from shared.video import Video


class BlurCodec:
    """Loses what a box blur loses; `kernel` 1 loses nothing."""

    def __init__(self, kernel: int) -> None:
        self.name, self.kernel = f"blur-{kernel}", kernel

    def encode(self, video: Video) -> torch.Tensor:
        return video.to_pixels()

    def decode(self, codes: torch.Tensor, fps: float) -> Video:
        blurred = F.avg_pool2d(codes, self.kernel, 1, self.kernel // 2, count_include_pad=False)
        return Video.from_pixels(blurred, fps)


@dataclass
class FakeGenerator:
    """`wrong_from` makes the seeds from there on show another colour; `fail_on` seeds raise."""

    name: str
    wrong_from: int = 1000
    fail_on: tuple[int, ...] = ()
    fps: float = shapes.FPS
    num_frames: int = shapes.NUM_FRAMES
    kernel: int | None = 1
    steps: int = 4
    tasks: frozenset[str] = frozenset({"t2v"})
    calls: list[int] = field(default_factory=list)

    @property
    def codec(self) -> BlurCodec | None:
        return None if self.kernel is None else BlurCodec(self.kernel)

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "fps": self.fps, "wrong_from": self.wrong_from}

    def generate(self, request: GenerationRequest) -> GenerationResult:
        self.calls.append(request.seed)
        if request.seed in self.fail_on:
            raise RuntimeError("the model fell over")
        wanted: dict[str, Any] = {"shape": "circle", "colour": "red", "motion": "still", "background": "gray"}
        wanted |= shapes.parse(request.prompt)
        if request.seed >= self.wrong_from:
            wanted["colour"] = "cyan" if wanted["colour"] != "cyan" else "red"
        caption = shapes.Caption(**{"speed": None, **wanted})
        scene = shapes.draw_scene(np.random.default_rng(request.seed), caption=caption)
        clip = shapes.render(scene, num_frames=self.num_frames)
        stages = {
            "text": StageStats(seconds=0.01, peak_bytes=1000),
            "model": StageStats(seconds=0.2, peak_bytes=5000, units=self.steps, unit="step"),
            "model/late": StageStats(seconds=0.1, peak_bytes=4000, units=2, unit="step"),
        }
        return GenerationResult(video=Video(frames=clip.frames, fps=self.fps), stages=stages)
