"""What may be compared with what, and the words for it. Refuses rather than prints a wrong number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, Protocol

from benchmarks.metrics import METRICS, Metric, RefusedError, cost, diagnostics, reconstruction
from benchmarks.sets import SetScore
from benchmarks.statistics import Interval, holm, normal_p, paired_difference
from benchmarks.storage import TIMED_METRICS
from benchmarks.suites import Suite

FEW_PROMPTS = 16  # below, a difference must be very large for its interval to exclude zero

MAX_NAMED = 4  # differences in one note

MIN_PAIRS = 6  # fewer pairs, all of one sign, are still within chance at 5 % (sign test)

# of the same true clips for every model, or the cost of a video as it was made: no window matters
WINDOWLESS = {metric.name for metric in (*reconstruction.METRICS, *diagnostics.METRICS, *cost.METRICS)}

Films = Sequence[Mapping[str, Any]]


class Row(Protocol):
    """Values of one model."""

    refused: dict[str, str]
    values: dict[str, dict[str, float]]

    def by_prompt(self, metric: str) -> dict[int, float]: ...


def paired(
    rows: Mapping[str, Row], films: Mapping[str, Films], metrics: Mapping[str, Metric] = METRICS
) -> list[dict[str, Any]]:
    """The difference of every two models for every metric that both have, on the prompts that both have."""
    return [
        difference(
            metric, (a, b), (rows[a].by_prompt(name), rows[b].by_prompt(name)), unlike(films[a], films[b])
        )
        for a, b in combinations(rows, 2)
        for name, metric in metrics.items()
        if rows[a].values.get(name) and rows[b].values.get(name)
    ]


def difference(
    metric: Metric,
    names: tuple[str, str],
    values: tuple[Mapping[Any, float], Mapping[Any, float]],
    unlike_videos: str,
) -> dict[str, Any]:
    """`names[0] - names[1]` with its interval and a verdict in words, or the reason why there is none.

    `values` are by prompt; the prompts that both have count.
    """
    entry: dict[str, Any] = {
        "a": names[0],
        "b": names[1],
        "metric": metric.name,
        "recipe": metric.recipe_line,
    }
    common = sorted(values[0].keys() & values[1].keys())
    if reason := refusal(metric, unlike_videos):
        return {**entry, "refused": reason}
    if not common:
        return {**entry, "refused": "the two share no prompt"}
    first, second = ([v[index] for index in common] for v in values)
    interval = paired_difference(first, second, proportion=metric.proportion)
    return {**entry, **asdict(interval), "verdict": verdict(metric, names, interval)}


def set_difference(
    metric: Metric, names: tuple[str, str], first: SetScore, second: SetScore, films: tuple[Films, Films]
) -> dict[str, Any]:
    """The same for one number per set of videos: never between sets of other prompts, lengths or rates."""
    entry = {"a": names[0], "b": names[1], "metric": metric.name, "recipe": metric.recipe_line}
    if reason := refusal(metric, unlike(*films)):
        return {**entry, "refused": reason}
    try:
        interval = first.minus(second)
    except RefusedError as reason:
        return {**entry, "refused": str(reason)}
    return {**entry, **asdict(interval), "verdict": verdict(metric, names, interval)}


def multiple_comparisons(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note on how many of the differences that were called stand when all are tested together; what a clock
    said is no question of quality, and would make the note another one in every run."""
    tested = [
        entry
        for entry in differences
        if "value" in entry and entry["n"] >= MIN_PAIRS and entry["metric"] not in TIMED_METRICS
    ]
    called = [entry["low"] > 0 or entry["high"] < 0 for entry in tested]
    if len(tested) < 2 or not any(called):
        return []
    stands = holm([normal_p(entry["value"], entry["low"], entry["high"]) for entry in tested])
    pairs = {(entry["a"], entry["b"]) for entry in tested}
    fallen = [
        entry["metric"] + (f" of {entry['a']} − {entry['b']}" if len(pairs) > 1 else "")
        for entry, a, b in zip(tested, called, stands, strict=True)
        if a and not b
    ]
    words = f"{len(tested)} differences are tested at 5 % each, so that one in twenty is called by chance; "
    if not fallen:
        return [f"{words}all {sum(called)} that are called also stand when tested together (Holm)"]
    listed = ", ".join(fallen[:MAX_NAMED]) + (
        f" and {more} more" if (more := len(fallen) - MAX_NAMED) > 0 else ""
    )
    return [
        f"{words}{sum(called) - len(fallen)} of {sum(called)} that are called stand when tested together "
        f"(Holm), not {listed}"
    ]


def verdict(metric: Metric, names: tuple[str, str], interval: Interval) -> str:
    """What the interval allows to say."""
    if interval.n < MIN_PAIRS:
        return f"{interval.n} prompts are too few to tell"
    if not interval.excludes_zero:
        return f"no difference shown with {interval.n} prompts"
    higher, lower = names if interval.value > 0 else names[::-1]
    if metric.better == "neither":
        return f"{higher} is higher"
    return f"{higher if metric.better == 'higher' else lower} is better"


def refusal(metric: Metric, unlike_videos: str) -> str:
    """Why values of unlike videos do not belong in one column, or ""."""
    if not unlike_videos or metric.name in WINDOWLESS:
        return ""
    if metric.per_frame_step:
        return f"{metric.title} depends on the step between frames; {unlike_videos}"
    if "last" in unlike_videos:
        return f"the windows differ: {unlike_videos}; state a common window (--window)"
    return ""


def unlike(first: Films, second: Films) -> str:
    """How the videos of two models differ in rate, size or duration, or ""."""
    kinds = [
        {(s["video"]["fps"], s["video"]["width"], s["video"]["height"]) for s in films}
        for films in (first, second)
    ]
    spans = [{round(s["video"]["frames"] / s["video"]["fps"], 3) for s in films} for films in (first, second)]
    if not all(kinds):
        return ""
    found = []
    if kinds[0] != kinds[1]:
        words = [" and ".join(f"{w}x{h} at {fps:g} fps" for fps, w, h in sorted(kind)) for kind in kinds]
        found.append(f"the videos are {words[0]} against {words[1]}")
    if spans[0] != spans[1]:
        words = [" and ".join(f"{seconds:g} s" for seconds in sorted(span)) for span in spans]
        found.append(f"the videos last {words[0]} against {words[1]}")
    return "; ".join(found)


def through_window(suite: Suite, films: Films) -> list[dict[str, Any]]:
    """Sidecars with the video as it is measured: where the suite has a window, not the one that was made."""
    if suite.window is None:
        return [{**sidecar} for sidecar in films]
    window = suite.window
    seen = {"frames": window.num_frames, "fps": window.fps, "height": window.height, "width": window.width}
    return [{**sidecar, "video": seen} for sidecar in films]


def notes(
    suite: Suite, rows: Mapping[str, Row], films: Mapping[str, Films], failed: Mapping[str, str]
) -> list[str]:
    """What a reader must know before reading the numbers."""
    found = [*unequal_videos(films)]
    if suite.window is not None:
        found.append(f"every video is measured through one window: {suite.window.words}")
    found += [*made_elsewhere(films), *missing_videos(suite, films), *mixed_machines(films)]
    found += [
        f"{name}: {metric} refused: {reason}"
        for name, row in rows.items()
        for metric, reason in row.refused.items()
    ]
    if failed:
        found.append(f"{left_out(failed)}; each is listed with its reason under “Left out”")
    if suite.num_prompts < FEW_PROMPTS:
        found.append(
            f"{suite.num_prompts} prompts show how the models behave, not which is better: intervals are "
            "wide. The suite “full” narrows them."
        )
    if not suite.warm_up:
        found.append("no warm-up: the first video of each model carries one-time costs in its seconds")
    return found


def left_out(failed: Mapping[str, str]) -> str:
    """How many items no number rests on."""
    are = "item is" if len(failed) == 1 else "items are"
    return f"{len(failed):,} {are} damaged or failed, and left out of every number"


def made_elsewhere(films: Mapping[str, Films]) -> list[str]:
    """Imported videos are measured as their files show them."""
    found = []
    for name, sidecars in films.items():
        kinds = sorted({kind for s in sidecars for kind in s.get("settings", {}).get("container", ())})
        if any(s.get("settings", {}).get("family") == "external" for s in sidecars):
            found.append(
                f"{name}: made elsewhere, read from {', '.join(kinds)}; its seconds are those of reading, "
                "and what a lossy file lost is in its numbers"
            )
    return found


def unequal_videos(films: Mapping[str, Films]) -> list[str]:
    kinds = {name: sorted({video_words(s["video"]) for s in sidecars}) for name, sidecars in films.items()}
    if len({tuple(words) for words in kinds.values()}) <= 1:
        return []
    listed = "; ".join(f"{name} {' and '.join(words) or 'none'}" for name, words in kinds.items())
    return [f"the models' videos differ in length, rate or size: {listed}"]


def video_words(video: Mapping[str, float]) -> str:
    return f"{video['frames']:g} frames of {video['width']:g}x{video['height']:g} at {video['fps']:g} fps"


def missing_videos(suite: Suite, films: Mapping[str, Films]) -> list[str]:
    wanted = suite.num_prompts * suite.num_videos_per_prompt
    return [
        f"{name}: {len(sidecars)} of {wanted} videos are there; differences use the prompts that both have"
        for name, sidecars in films.items()
        if len(sidecars) < wanted
    ]


def mixed_machines(films: Mapping[str, Films]) -> list[str]:
    keys = ("processor", "accelerator", "threads", "torch")
    machines = {
        tuple(str(s["environment"][key]) for key in keys) for sidecars in films.values() for s in sidecars
    }
    return ["the videos were made on different machines or settings: their seconds do not compare"] * (
        len(machines) > 1
    )
