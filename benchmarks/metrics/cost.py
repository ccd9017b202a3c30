"""What a video costs, from the sidecars that the runner wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.metrics.base import Metric

METRICS = (
    Metric(
        name="seconds_per_video",
        title="Seconds per video",
        recipe="wall-clock seconds of one generate() call, one video at a time, without loading the model",
        unit="s",
        better="lower",
    ),
    Metric(
        name="joules_per_video",
        title="Energy per video",
        recipe="joules by which the machine's own counters (RAPL packages and memory, NVML) rose during one "
        "generate() call: all that the machine did meanwhile",
        unit="J",
        better="lower",
    ),
)


def measure(sidecar: Mapping[str, Any]) -> dict[str, float]:
    """Cost of one finished video; its energy where the machine counted it."""
    found = {"seconds_per_video": float(sidecar["seconds"])}
    if joules := sidecar.get("joules"):
        found["joules_per_video"] = float(sum(joules.values()))
    return found


def stages(sidecars: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per stage over all videos: mean seconds per video, greatest peak, mean units, units per second."""
    names = list(dict.fromkeys(name for sidecar in sidecars for name in sidecar["stages"]))
    return {name: _stage([s["stages"][name] for s in sidecars if name in s["stages"]]) for name in names}


def top_level(names: Sequence[str]) -> list[str]:
    """Stages that add up to the whole: "model/interpolation" is part of "model" where that is listed too."""
    return [name for name in names if not any(name.startswith(f"{other}/") for other in names)]


def _stage(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = sum(run["seconds"] for run in runs)
    units = sum(run["units"] for run in runs)
    return {
        "seconds": seconds / len(runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "units": units / len(runs),
        "unit": next((run["unit"] for run in runs if run["unit"]), ""),
        "units_per_second": units / seconds if units and seconds > 0 else None,
        "n": len(runs),
    }
