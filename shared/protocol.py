"""What the benchmark sees of a model family, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from shared.video import Video


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One video to make."""

    prompt: str
    seed: int = 0
    sample: int = 0  # which of several videos of one prompt; the seed already differs
    image: Tensor | None = None  # uint8 [H, W, 3]: i2v
    video: Video | None = None  # v2v


@dataclass(frozen=True, kw_only=True)
class StageStats:
    """Cost of one stage. `units` counts its sequential work: tokens, denoising steps or frames."""

    seconds: float
    peak_bytes: int
    units: int = 0
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The video, and its cost by stage ("text", "model", "decode"; finer: "model/interpolation")."""

    video: Video
    stages: dict[str, StageStats] = field(default_factory=dict)
    # what was found out about the video, for its sidecar
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        return {name: stats.seconds for name, stats in self.stages.items()}


class VideoGenerator(Protocol):
    """A model with its sampling settings fixed."""

    name: str
    tasks: frozenset[str]  # of {"t2v", "i2v", "v2v"}

    def generate(self, request: GenerationRequest) -> GenerationResult: ...

    def settings(self) -> dict: ...


class DiagnosticModel(Protocol):
    """A model that says of true clips how well it predicts them; the benchmark asks where it is offered."""

    def diagnostics(self, videos: Sequence[Video], prompts: Sequence[str]) -> dict[str, list[float]]:
        """One value per clip of every figure; ValueError for clips that the model cannot take."""
        ...


class VideoCodec(Protocol):
    """A video autoencoder; reconstruction is compared too."""

    name: str

    def encode(self, video: Video) -> Tensor: ...

    def decode(self, codes: Tensor, fps: float) -> Video: ...
