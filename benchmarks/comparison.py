"""Two finished runs against each other, prompt by prompt: before and after a change, or two machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

from benchmarks.fairness import difference, refusal, unlike, verdict
from benchmarks.metrics import METRICS, RefusedError
from benchmarks.metrics.distances import SET_METRICS, SetMetric
from benchmarks.sets import saved_difference
from benchmarks.storage import RunFolder, read_json
from shared.errors import SettingError

Results = Mapping[str, Any]


def compare(first: RunFolder, second: RunFolder) -> list[dict[str, Any]]:
    """Differences `first - second` for every metric that both runs have, each with a verdict or a refusal.

    Models of the same name are paired; where no name is common, every model with every other. Raises
    SettingError for a folder without results, and for runs that share no prompt and seed.
    """
    results = [load_results(folder) for folder in (first, second)]
    entries = [
        entry for names in pairs(*results) for entry in model_differences(names, results[0], results[1])
    ]
    if not any("value" in entry for entry in entries):
        reasons = sorted({entry["refused"] for entry in entries}) or ["no metric is in both"]
        raise SettingError(f"{first.path} and {second.path} cannot be compared: {'; '.join(reasons)}")
    return entries


def load_results(folder: RunFolder) -> dict[str, Any]:
    """results.json with the values of every item under "items", and of the distances under "sets"."""
    if not (folder.path / "results.json").is_file():
        raise SettingError(f"{folder.path} has no results.json (make it with `report {folder.path}`)")
    sets = folder.path / "sets.json"  # absent in runs that an older version measured
    return {
        **read_json(folder.path / "results.json"),
        "items": read_json(folder.path / "per_item.json"),
        "sets": read_json(sets) if sets.is_file() else {},
    }


def pairs(first: Results, second: Results) -> list[tuple[str, str]]:
    common = [name for name in first["models"] if name in second["models"]]
    return [(name, name) for name in common] or list(product(first["models"], second["models"]))


def model_differences(names: tuple[str, str], first: Results, second: Results) -> list[dict[str, Any]]:
    results = (first, second)
    labels = names if names[0] != names[1] else (f"{names[0]} (first)", f"{names[1]} (second)")
    rows = [r["models"][name] for r, name in zip(results, names, strict=True)]
    items = [r["items"][name] for r, name in zip(results, names, strict=True)]
    sets = [r["sets"].get(name, {}) for r, name in zip(results, names, strict=True)]
    return [
        metric_difference(
            name, labels, rows, (items, sets), [r["recipe"]["metrics"][name]["id"] for r in results]
        )
        for name in METRICS
        if all(
            name in row["metrics"] and name in r["recipe"]["metrics"]
            for row, r in zip(rows, results, strict=True)
        )
    ]


def metric_difference(
    name: str,
    labels: tuple[str, str],
    rows: list[Mapping[str, Any]],
    values: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]],
    recipes: list[str],
) -> dict[str, Any]:
    """One metric of two models: on the items that both made from the same prompt and seed, or, for one number
    of a whole set, on sets of the same prompts. `values` are those of (items, sets) of both."""
    items, sets = values
    if recipes[0] != recipes[1]:
        reason = f"measured by two recipes, {recipes[0]} and {recipes[1]}"
        return {"a": labels[0], "b": labels[1], "metric": name, "refused": reason}
    if name in SET_METRICS:
        return saved_set_difference(SET_METRICS[name], labels, rows, [own.get(name) for own in sets])
    means = [paired_values(name, own, other) for own, other in ((items[0], items[1]), (items[1], items[0]))]
    return difference(METRICS[name], labels, (means[0], means[1]), unlike_rows(rows))


def saved_set_difference(
    metric: SetMetric,
    labels: tuple[str, str],
    rows: list[Mapping[str, Any]],
    saved: list[Mapping[str, Any] | None],
) -> dict[str, Any]:
    """The difference of two distances, by leaving out the same prompts of both in turn: resampling with
    repetition would repeat videos, which inflates a distance."""
    entry: dict[str, Any] = {"a": labels[0], "b": labels[1], "metric": metric.metric.name}
    first, second = saved
    if reason := refusal(metric.metric, unlike_rows(rows)):
        return {**entry, "refused": reason}
    if first is None or second is None:
        return {
            **entry,
            "refused": "one run's distances were measured by an older version: `report` it again",
        }
    try:
        interval = saved_difference(first, second, same_reference=metric.reference == "truth")
    except RefusedError as reason:
        return {**entry, "refused": str(reason)}
    return {**entry, **asdict(interval), "verdict": verdict(metric.metric, labels, interval)}


def paired_values(name: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Mean value per prompt over the items that have a pair in `other`."""
    there = {key(item) for item in other.values() if name in item["values"]}
    found: dict[str, list[float]] = {}
    for item in own.values():
        if name in item["values"] and key(item) in there:
            found.setdefault(item["prompt"], []).append(item["values"][name])
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def key(item: Mapping[str, Any]) -> tuple[str, str]:
    return item["prompt"], item["pair"]


def unlike_rows(rows: list[Mapping[str, Any]]) -> str:
    """How the two models' videos differ in rate, size or duration, or ""."""
    videos = [row["video"] for row in rows]
    if None in videos:
        return "the videos of one model differ among themselves"
    return unlike([{"video": videos[0]}], [{"video": videos[1]}])
