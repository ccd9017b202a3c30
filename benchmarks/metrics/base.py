"""What a metric is: a name, a recipe and a pure function of frames."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal


class RefusedError(ValueError):
    """The metric would be wrong for this video; the message is the reason that the report gives."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a number is to be read. `per_frame_step` marks a value that depends on the time and the pixels
    between two frames, so that it compares videos of equal rate and size only. `over` "sets" is one number
    for all videos together; `needs` names the user's feature file (`benchmarks.features.files.KINDS`);
    `mark` is a warning that stands wherever the number does."""

    name: str
    title: str
    recipe: str
    unit: str = ""
    better: Literal["higher", "lower", "neither"] = "higher"
    proportion: bool = False
    per_frame_step: bool = False
    over: Literal["videos", "sets"] = "videos"
    needs: str = ""
    mark: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    version: int = 1

    @property
    def recipe_id(self) -> str:
        """Eight digits of a hash: two numbers with the same id were measured the same way."""
        return digest([self.name, self.version, self.recipe, self.parameters])[:8]

    @property
    def recipe_line(self) -> str:
        return f"{self.recipe_id} {self.recipe}" + (f"; {self.mark}" if self.mark else "")

    def with_file(self, sha256: str) -> Metric:
        """The same metric measured with this file: numbers of other files have another recipe."""
        return replace(self, parameters={**self.parameters, "file_sha256": sha256})


def digest(content: Any) -> str:
    """Sha-256 of a JSON value, in hex; the same for the same content whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
