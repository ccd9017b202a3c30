"""Plots as inline SVG. Colours are variables of the page, so one drawing serves light, dark and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.metrics.cost import top_level
from benchmarks.wording import seconds, title

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


def quality_and_cost(models: Models) -> str:
    """Prompt accuracy over seconds per video, with both intervals; "" where a model lacks either."""
    needed = ("seconds_per_video", "prompt_accuracy")
    if not models or any(name not in row["metrics"] for row in models.values() for name in needed):
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(3.1)
        for index, (model, row) in enumerate(models.items()):
            x, y = (row["metrics"][name] for name in needed)
            colour = SERIES[index % len(SERIES)]
            axes.plot([x["low"], x["high"]], [100 * y["value"]] * 2, color=colour, linewidth=1.6, alpha=0.6)
            axes.plot(
                [x["value"]] * 2, [100 * y["low"], 100 * y["high"]], color=colour, linewidth=1.6, alpha=0.6
            )
            axes.plot(x["value"], 100 * y["value"], MARKERS[index % len(MARKERS)], color=colour, markersize=9)
            axes.annotate(
                model, (x["value"], 100 * y["value"]), xytext=(9, 9), textcoords="offset points", color=colour
            )
        axes.set(
            xscale="log",
            ylim=(-4, 106),
            xlabel="seconds per video (logarithmic)",
            ylabel="prompt accuracy, %",
        )
        _wide_log_axis(axes, [row["metrics"]["seconds_per_video"] for row in models.values()])
        axes.grid(axis="y", linewidth=0.8)
        axes.tick_params(length=0, labelcolor=MUTED)
        return inline(figure, "cost", "Prompt accuracy against seconds per video")


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
