"""Numbers and findings as people read them; the report's pages share these words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.metrics import METRICS, Metric

Value = Mapping[str, Any]


def number(metric: Metric, value: float, *, sign: bool = False) -> str:
    """A value of a metric with its unit: 75 %, 31.2 dB, 0.984; a difference of shares is in points."""
    places = 0 if metric.proportion else digits(metric, value)
    scaled = round(100 * value if metric.proportion else value, places) + 0.0  # no minus before a zero
    mark = "+" if sign and scaled else ""
    unit = ("points" if sign else "%") if metric.proportion else metric.unit
    return f"{scaled:{mark}.{places}f} {unit}".strip()


def digits(metric: Metric, value: float) -> int:
    """Places after the point; most values without a unit lie in 0..1, distances may be large."""
    if not metric.unit and abs(value) >= 10:
        return 1
    if not metric.unit:
        return 4 if 0.995 < value < 1 or abs(value) < 0.01 else 3
    return 2 if abs(value) < 10 else 1


def span(metric: Metric, value: Value, *, sign: bool = False) -> str:
    """The interval of a value, without repeating its unit: 25 to 100 %."""
    low, high = (number(metric, value[end], sign=sign) for end in ("low", "high"))
    unit = high.rpartition(" ")[2] if " " in high else ""
    return f"{low.removesuffix(f' {unit}') if unit else low} to {high}"


def title(name: str) -> str:
    """A metric's words, or the name of a metric of another version."""
    return METRICS[name].title if name in METRICS else name


def titled(metric: Metric) -> str:
    """Its words and an arrow that points to the better end."""
    return metric.title + {"higher": " ↑", "lower": " ↓", "neither": ""}[metric.better]


def operations(value: float) -> str:
    """Floating-point operations with three figures: 42 FLOP, 3.21 GFLOP, 664 TFLOP."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:,.0f} {unit}FLOP" if value >= 100 else f"{value:.3g} {unit}FLOP"
        value /= 1000
    raise AssertionError("unreachable: T takes every number")


def counted(count: int, unit: str) -> str:
    """1 step, 25 steps."""
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


def parameters(values: Mapping[str, Any]) -> str:
    """A recipe's parameters in one line; a checksum keeps its first digits."""
    words = {name: str(value) for name, value in values.items()}
    words = {name: f"{text[:12]}…" if len(text) == 64 else text for name, text in words.items()}
    return ", ".join(f"{name} {text}" for name, text in words.items())


def skipped(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a metric needs -> the metrics that were not measured without it."""
    groups: dict[str, list[str]] = {}
    for name, reason in results["skipped"].items():
        groups.setdefault(reason.removeprefix("skipped: "), []).append(name)
    return groups


def seeds(suite: Any) -> str:
    """The seeds of a suite's videos."""
    last = suite.seed + suite.num_prompts * suite.num_videos_per_prompt - 1
    return f"seed {suite.seed}" if last == suite.seed else f"seeds {suite.seed} to {last}"


def seconds(value: float) -> str:
    """A duration with two figures: 250 µs, 85 ms, 0.42 s, 12 s, 3.1 min."""
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs" if value >= 1e-5 else f"{1e6 * value:.2g} µs"
    if value < 0.1:
        return f"{1000 * value:.2g} ms" if value < 0.01 else f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.3g} min"


def size(value: float) -> str:
    """Bytes in the largest unit that leaves a figure before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: GiB takes every size")


def rate(stage: Value) -> str:
    """Units of a stage per second, or a dash where it counts none: 3.4 steps/s, 20,700 tokens/s."""
    speed = stage["units_per_second"]
    if not speed:
        return "–"
    figures = f"{speed:,.0f}" if speed >= 100 else f"{speed:.2g}"
    unit = (stage["unit"] or "unit").removesuffix("s")
    return f"{figures} {unit}s/s"


def peak(stages: Mapping[str, Value]) -> str:
    """The greatest peak of all stages, or a dash where none was measured."""
    most = max((stage["peak_bytes"] for stage in stages.values()), default=0)
    return size(most) if most else "–"


def headline(results: Mapping[str, Any]) -> list[str]:
    """The findings in sentences: what each model got right, what may be said of the difference, the cost."""
    models = results["models"]
    name = "prompt_accuracy"
    shares = [
        f"{'by ' * (index > 0)}{model} in {number(METRICS[name], row['metrics'][name]['value'])}"
        for index, (model, row) in enumerate(models.items())
        if name in row["metrics"]
    ]
    sentences = [f"All that the prompt asks for is shown by {listed(shares)} of prompts."] if shares else []
    found = [e for e in results["differences"] if e["metric"] == name and "verdict" in e]
    if len(found) == 1:
        sentences.append(f"{sentence(found[0]['verdict'])}.")
    elif found:
        sentences += pair_sentences(METRICS[name], found)
    return sentences + cost_sentences(models)


def listed(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def pair_sentences(metric: Metric, differences: Sequence[Value]) -> list[str]:
    """Which of several pairs differ, the greatest difference first; the others are named together."""
    told = sorted((e for e in differences if is_called(e)), key=lambda e: -abs(e["value"]))
    sentences = []
    for entry in told:
        better, worse = (entry["a"], entry["b"]) if entry["value"] > 0 else (entry["b"], entry["a"])
        gap = number(metric, abs(entry["value"]), sign=True).lstrip("+")
        sentences.append(f"{better} is ahead of {worse} by {gap}.")
    level = [f"{e['a']} and {e['b']}" for e in differences if not is_called(e)]
    return sentences + ([f"No difference is shown between {'; '.join(level)}."] if level else [])


def is_called(entry: Value) -> bool:
    """Does the verdict name one of the two? Its words for the others are those of `fairness.verdict`."""
    return "verdict" in entry and entry["verdict"].endswith((" is better", " is higher"))


def called(differences: Sequence[Value]) -> str:
    """How many of a metric's pairs differ."""
    refused = sum("refused" in entry for entry in differences)
    words = f"{sum(map(is_called, differences))} of {len(differences)} pairs differ"
    return f"{words}, {refused} refused" if refused else words


def cost_sentences(models: Mapping[str, Any]) -> list[str]:
    costs = {
        model: row["metrics"]["seconds_per_video"]["value"]
        for model, row in models.items()
        if "seconds_per_video" in row["metrics"]
    }
    if len(costs) < 2:
        return []
    quick, slow = min(costs, key=lambda m: costs[m]), max(costs, key=lambda m: costs[m])
    times = costs[slow] / max(costs[quick], 1e-9)
    words = f"{quick} {seconds(costs[quick])} and {slow} {seconds(costs[slow])}"
    return [f"One video takes {words}, {times:.1f} times as long."]


def sentence(words: str) -> str:
    """With a capital letter where it starts with a common word: a model's name keeps its own."""
    return words[0].upper() + words[1:] if words.startswith("no ") else words
