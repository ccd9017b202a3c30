"""The page that goes with trained weights: what they are, how they came about, how good they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One finished training stage, read from its folder."""

    name: str
    steps: int
    minutes: float  # of wall clock, over all sittings
    loss: float


def read_stage(folder: Path) -> StageRecord:
    """From a training folder's log; a resumed run's clock starts again in every sitting."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["elapsed"] for line in lines]
    ends = [now for now, after in zip(seconds, [*seconds[1:], 0.0], strict=True) if after < now]
    loss = next(line["loss"] for line in reversed(lines) if "loss" in line)
    return StageRecord(
        name=folder.name, steps=lines[-1]["step"], minutes=sum(ends) / 60, loss=round(float(loss), 4)
    )


def model_card(
    title: str,
    summary: str,
    *,
    command: str,
    stages: list[StageRecord],
    parameters: dict[str, int],
    results: dict[str, Any] | None,
) -> str:
    """Markdown. `results`: one model's entry of a benchmark's results.json; None before it was measured."""
    lines = [f"# {title}", "", summary, "", "## How they were made", "", "```", command, "```", ""]
    lines += ["| stage | steps | minutes (wall clock, shared 2-core CPU) | last loss |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.steps} | {s.minutes:.0f} | {s.loss} |" for s in stages]
    lines += ["", "## Size", "", "| part | parameters |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in parameters.items()]
    lines += ["", "## Measured", ""]
    return "\n".join([*lines, *_measured(results), ""])


def _measured(results: dict[str, Any] | None) -> list[str]:
    if results is None:
        return ["Not measured yet: `cogvideo-bench run demo --prompts heldout --num_prompts 64`."]
    rows = [
        f"| {name} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['n']} |"
        for name, m in results["metrics"].items()
        if name.startswith(("prompt_accuracy", "reconstruction"))
    ]
    head = "`cogvideo-bench run demo --prompts heldout --num_prompts 64`; 95 % intervals over the prompts."
    return [head, "", "| metric | value | interval | n |", "|---|---|---|---|", *rows]
