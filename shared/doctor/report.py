"""What a doctor says: findings with a reason and a next step, and one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.config_io import to_plain
from shared.errors import WeightsError

Level = Literal["bad", "risk", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong ("bad"), may go wrong ("risk"), or is worth knowing ("note")."""

    level: Level
    reason: str
    next: str = ""  # a command as a shell takes it; "": none is known


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """`next` is what to do now: after the first finding, or with a model that is good."""

    path: str
    family: str = "unknown"
    layout: str = "unknown"
    model: str = "unknown"  # the preset it has the structure of
    findings: tuple[Finding, ...] = ()
    use: str = ""  # the command that the files are good for
    sha256: dict[str, str] = field(default_factory=dict)  # by file, where they were computed

    @property
    def verdict(self) -> Literal["good", "risky", "bad"]:
        levels = {finding.level for finding in self.findings}
        return "bad" if "bad" in levels else "risky" if "risk" in levels else "good"

    @property
    def exit_code(self) -> int:
        return WeightsError.exit_code if self.verdict == "bad" else 0

    @property
    def next(self) -> str:
        steps = [f.next for level in ("bad", "risk") for f in self.findings if f.level == level and f.next]
        return steps[0] if steps else "" if self.verdict == "bad" else self.use

    def plain(self) -> dict[str, Any]:
        """As one JSON object."""
        said = {"verdict": self.verdict, "exit_code": self.exit_code, "next": self.next}
        return {**to_plain(self), **said}

    def lines(self) -> Sequence[str]:
        """As sentences."""
        head = f"{self.path}: {self.verdict} (family {self.family}, layout {self.layout}, model {self.model})"
        found = [f"{finding.level}: {finding.reason}" for finding in self.findings]
        sums = [f"sha256: {digest}  {file}" for file, digest in self.sha256.items()]
        return [head, *found, *sums, *([f"next: {self.next}"] if self.next else [])]


def bad(reason: object, next_step: str = "") -> Finding:
    """What keeps the files from being used."""
    return Finding(level="bad", reason=str(reason), next=next_step)


def risk(reason: object, next_step: str = "") -> Finding:
    """What may spoil results."""
    return Finding(level="risk", reason=str(reason), next=next_step)


def note(reason: object) -> Finding:
    """What spoils nothing."""
    return Finding(level="note", reason=str(reason))
