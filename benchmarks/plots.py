"""Plots as inline SVG. Colours are variables of the page, so one drawing serves light, dark and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.expected import CPU, devices
from benchmarks.metrics import METRICS
from benchmarks.metrics.cost import top_level
from benchmarks.wording import seconds, size, title, titled
from shared.costs import Device

INK, MUTED, GRID, CARD = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0102{16 + index:02x}" for index in range(6))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", CARD: "--card"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "grid.color": GRID,
}
WIDTH = 5.0  # inches: at a phone's width the letters keep about their size
MARKERS = "osD^vP"
QUALITY = ("prompt_accuracy", "clip/sim", "inception_score", "fvd/stylegan-v/fvd2048_16f", "fvd/videogpt",
           "frechet/own", "frechet/fixed")  # fmt: skip
MAX_COST_PLOTS = 2
LABEL_POINTS = 170.0  # height of a cost plot's axes, about
NEAR = 0.12  # of a plot's side: labels of one text closer than that are one
ATTRIBUTE_ROWS = ("", "/colour", "/shape", "/motion", "/speed", "/background", "/valid")

Models = Mapping[str, Mapping[str, Any]]


def attribute_bars(models: Models) -> str:
    """Prompt accuracy as a whole and by attribute, a bar for each model with its interval; "" without any."""
    names = [f"prompt_accuracy{part}" for part in ATTRIBUTE_ROWS]
    names = [name for name in names if any(name in row["metrics"] for row in models.values())]
    if not names:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(0.62 * len(names) * max(1, len(models) / 2) + 0.7)
        for index, row in enumerate(models.values()):
            _interval_bars(axes, names, row["metrics"], index, len(models))
        axes.set(xlim=(0, 103), xticks=range(0, 101, 25), xlabel="% of prompts, with 95 % intervals")
        axes.set_yticks(range(len(names)), [title(name) for name in names])
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.get_yticklabels()[0].set_fontweight("bold")
        axes.grid(axis="x", linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        words = "Share of prompts shown correctly, as a whole and by attribute"
        return inline(figure, "attributes", words)


def _interval_bars(
    axes: Axes, names: Sequence[str], metrics: Mapping[str, Any], index: int, count: int
) -> None:
    height = 0.72 / count
    for row, name in enumerate(names):
        if name not in metrics:
            continue
        value = metrics[name]
        y = row + (index - (count - 1) / 2) * height
        colour = SERIES[index % len(SERIES)]
        axes.barh(y, 100 * value["value"], height * 0.8, color=colour, alpha=0.38)
        axes.plot([100 * value["low"], 100 * value["high"]], [y, y], color=colour, linewidth=2.2)
        axes.plot(100 * value["value"], y, MARKERS[index % len(MARKERS)], color=colour, markersize=6)


def quality_and_cost(models: Models) -> list[str]:
    """The first metrics of QUALITY that all models have, over seconds per video, with both intervals."""
    if not models or any("seconds_per_video" not in row["metrics"] for row in models.values()):
        return []
    names = [name for name in QUALITY if all(name in row["metrics"] for row in models.values())]
    return [_quality_and_cost(models, name) for name in names[:MAX_COST_PLOTS]]


def _quality_and_cost(models: Models, name: str) -> str:
    metric = METRICS[name]
    scale = 100 if metric.proportion else 1
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(3.1)
        points = []
        for index, row in enumerate(models.values()):
            x = row["metrics"]["seconds_per_video"]
            y = {end: scale * row["metrics"][name][end] for end in ("value", "low", "high")}
            _crossed_intervals(axes, x, y, index)
            points.append((x["value"], y["value"]))
        unit = "%" if metric.proportion else metric.unit
        axes.set(xscale="log", xlabel="seconds per video (logarithmic)")
        axes.set_ylabel(f"{titled(metric)}{f', {unit}' if unit else ''}", wrap=True)
        if metric.proportion:
            axes.set_ylim(-4, 106)
        else:
            axes.margins(y=0.25)
        _wide_log_axis(axes, [row["metrics"]["seconds_per_video"] for row in models.values()])
        _named_points(axes, list(models), points)
        axes.grid(axis="y", linewidth=0.8)
        axes.tick_params(length=0, labelcolor=MUTED)
        return inline(figure, f"cost-{QUALITY.index(name)}", f"{metric.title} against seconds per video")


def _named_points(axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Labels to the right of the points, pushed apart where they would lie upon each other."""
    low, high = axes.get_ylim()
    below = -1.0
    for index in sorted(range(len(names)), key=lambda i: points[i][1]):
        at = (points[index][1] - low) / (high - low)
        place = min(max(at - 0.07 if below < 0 else at + 0.05, below + 0.085, 0.02), 1.0)
        below = place
        axes.annotate(
            names[index], points[index], xytext=(9, (place - at) * LABEL_POINTS),
            textcoords="offset points", color=SERIES[index % len(SERIES)], va="center",
        )  # fmt: skip


def _crossed_intervals(axes: Axes, x: Mapping[str, float], y: Mapping[str, float], index: int) -> None:
    colour = SERIES[index % len(SERIES)]
    axes.plot([x["low"], x["high"]], [y["value"]] * 2, color=colour, linewidth=1.6, alpha=0.6)
    axes.plot([x["value"]] * 2, [y["low"], y["high"]], color=colour, linewidth=1.6, alpha=0.6)
    axes.plot(x["value"], y["value"], MARKERS[index % len(MARKERS)], color=colour, markersize=9)


def _wide_log_axis(axes: Axes, values: Sequence[Mapping[str, float]]) -> None:
    """Room for the labels, and plain numbers at 1, 2 and 5 of each decade."""
    low = min(max(v["low"], 1e-4) for v in values) / 2.5
    high = max(v["high"] for v in values) * 8
    ticks = [step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks[:: max(1, len(ticks) // 6)], [f"{t:g}" for t in ticks[:: max(1, len(ticks) // 6)]])
    axes.set_xticks([], minor=True)


def stage_timeline(models: Models) -> str:
    """The stages of one video after one another, to scale; "" where no model names its stages."""
    rows = {name: row["stages"] for name, row in models.items() if row["stages"]}
    if not rows:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(0.85 * len(rows) + 0.6)
        longest = max(_total(stages) for stages in rows.values())
        for y, (model, stages) in enumerate(rows.items()):
            _stage_bars(axes, y, stages, SERIES[list(models).index(model) % len(SERIES)], longest)
            axes.text(0, y - 0.36, model, va="bottom", fontweight="bold")
            axes.text(longest, y - 0.36, seconds(_total(stages)), va="bottom", ha="right", color=MUTED)
        axes.set(
            xlim=(0, longest), ylim=(len(rows) - 0.5, -0.85), yticks=[], xlabel="seconds of one video, mean"
        )
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        return inline(figure, "timeline", "Seconds of each stage, one after the other, to scale")


def _stage_bars(axes: Axes, y: float, stages: Mapping[str, Any], colour: str, longest: float) -> None:
    """Neighbouring stages differ in strength, and each that has room carries its name."""
    start = 0.0
    for index, name in enumerate(top_level(list(stages))):
        length = stages[name]["seconds"]
        strong = index % 2 == 0
        axes.barh(y, length, 0.52, left=start, color=colour, alpha=0.85 if strong else 0.45)
        if length > longest * (0.03 + 0.016 * len(name)):
            axes.text(start + length / 2, y, name, ha="center", va="center", color=CARD if strong else INK)
        start += length


def memory_curves(models: Models) -> str:
    """The greatest peak of each stage along the time of one video; "" where none was measured."""
    rows = {name: row["stages"] for name, row in models.items()}
    rows = {name: s for name, s in rows.items() if any(stage["peak_bytes"] for stage in s.values())}
    if not rows:
        return ""
    most = max(stage["peak_bytes"] for stages in rows.values() for stage in stages.values())
    units = (("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0))
    unit, step = next((name, 2.0**power) for name, power in units if most >= 2**power)
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(2.6)
        told: list[tuple[float, float]] = []  # where names stand, as shares of the axes
        longest = max(_total(stages) for stages in rows.values())
        for model, stages in rows.items():
            _memory_curve(axes, stages, SERIES[list(models).index(model) % len(SERIES)], step, told,
                          (longest, most))  # fmt: skip
        axes.set(xlabel="seconds of one video, mean", ylabel=f"peak memory, {unit}")
        axes.set_xlim(left=0)
        axes.set_ylim(0, most / step * 1.18)
        axes.grid(axis="y", linewidth=0.8)
        axes.tick_params(length=0, labelcolor=MUTED)
        return inline(figure, "memory", "Greatest memory of each stage along the time of one video")


def _memory_curve(
    axes: Axes,
    stages: Mapping[str, Any],
    colour: str,
    step: float,
    told: list[tuple[float, float]],
    ends_of: tuple[float, float],
) -> None:
    """A level for each stage; the highest carries its name, unless one stands there already."""
    names = top_level(list(stages))
    levels = [stages[name]["peak_bytes"] for name in names]
    ends = [0.0]
    for name in names:
        ends.append(ends[-1] + stages[name]["seconds"])
    axes.stairs([level / step for level in levels], ends, color=colour, linewidth=2.0, baseline=None)
    axes.stairs([level / step for level in levels], ends, color=colour, alpha=0.14, fill=True)
    top = levels.index(max(levels))
    words = f"{names[top].rpartition('/')[2]} {size(levels[top])}"
    middle = (ends[top] + ends[top + 1]) / 2
    at = (middle / ends_of[0], levels[top] / ends_of[1])
    if any(abs(at[0] - x) < 2 * NEAR and abs(at[1] - y) < NEAR for x, y in told):
        return
    told.append(at)
    axes.annotate(words, (middle, levels[top] / step), xytext=(0, 4), textcoords="offset points", ha="center",
                  fontsize=9, color=colour)  # fmt: skip


def roofline(models: Models) -> str:
    """What each stage reached, by the operations that it has for every byte that it moves, under the roofs of
    named devices; "" where the cost model is silent."""
    points = [
        (index, stage, cost, row["stages"][stage]["seconds"])
        for index, row in enumerate(models.values())
        for stage, cost in row.get("cost_model", {}).items()
        if row["stages"].get(stage, {}).get("seconds") and cost["bytes_moved"]
    ]
    if not points:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(3.1)
        told: set[tuple[str, float]] = set()  # of models alike, the first names the stage
        for index, stage, cost, took in points:
            x, y = cost["flops"] / cost["bytes_moved"], cost["flops"] / took
            axes.plot(x, y, MARKERS[index % len(MARKERS)], color=SERIES[index % len(SERIES)], markersize=7)
            if (stage, round(x, 3)) not in told:
                told.add((stage, round(x, 3)))
                axes.annotate(
                    stage.rpartition("/")[2], (x, y), xytext=(6, 5 if len(told) % 2 else -12),
                    textcoords="offset points", fontsize=9, color=SERIES[index % len(SERIES)],
                )  # fmt: skip
        ratios = [cost["flops"] / cost["bytes_moved"] for _, _, cost, _ in points]
        low, high = min(ratios) / 4, max(300.0, *ratios) * 8
        for name, device in devices().items():
            _roof(axes, name, device, (low, high))
        axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations per byte moved",
                 ylabel="operations per second")  # fmt: skip
        axes.grid(linewidth=0.8)
        axes.tick_params(length=0, labelcolor=MUTED, which="both")
        return inline(figure, "roofline", "Operations per second of each stage under the roofs of devices")


def _roof(axes: Axes, name: str, device: Device, ends: tuple[float, float]) -> None:
    """Bandwidth up to the ridge, then matrix products (float32 on the CPU, 16 bits on GPUs)."""
    top = device.rate("matmul", torch.float32 if name == CPU else torch.bfloat16)
    speed = device.bandwidth * device.stream_share
    ridge = top / speed
    xs = [ends[0], ridge, ends[1]]
    axes.plot(xs, [min(top, speed * x) for x in xs], color=MUTED, linewidth=1.2)
    label = name if name == CPU else name.upper()
    axes.annotate(label, (ends[1], top), xytext=(-3, 3), textcoords="offset points", ha="right", fontsize=9,
                  color=MUTED)  # fmt: skip


def _total(stages: Mapping[str, Any]) -> float:
    return sum(stages[name]["seconds"] for name in top_level(list(stages))) or 1e-9


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def inline(figure: Figure, name: str, words: str) -> str:
    """The figure as one <svg> element: no headers, no addresses, its own ids, page variables for colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"^<svg[^>]*>", f'<svg {box[0] if box else ""} role="img" aria-label="{words}">', svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
