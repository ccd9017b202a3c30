"""What a metric is: a name, a recipe and a pure function of frames."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal


class RefusedError(ValueError):
    """The metric would be wrong for this video; the message is the reason that the report gives."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a number is to be read. `per_frame_step` marks a value that depends on the time and the pixels
    between two frames, so that it compares videos of equal rate and size only."""

    name: str
    title: str
    recipe: str
    unit: str = ""
    better: Literal["higher", "lower", "neither"] = "higher"
    proportion: bool = False
    per_frame_step: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    version: int = 1

    @property
    def recipe_id(self) -> str:
        """Eight digits of a hash: two numbers with the same id were measured the same way."""
        return digest([self.name, self.version, self.recipe, self.parameters])[:8]

    @property
    def recipe_line(self) -> str:
        return f"{self.recipe_id} {self.recipe}"


def digest(content: Any) -> str:
    """Sha-256 of a JSON value, in hex; the same for the same content whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
