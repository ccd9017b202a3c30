"""From the figures of all runs to differences with intervals, a Markdown table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kit import Outcome

from benchmarks.statistics import mean_interval, student_t
from shared.files import atomic_path

MARKER = "<!-- tables: examples/ablations/run.py writes what follows -->"
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182}  # the 97.5 % quantile where the expansion is off


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`name` of the arms' figures; `sign` 1: more is better, -1: less is better."""

    name: str
    words: str
    sign: int = -1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms: with the idea, and without it."""

    name: str
    title: str
    idea: str
    without: str
    labels: tuple[str, str]
    measures: tuple[Measure, ...]


LOSS = Measure(name="loss", words="held-out loss")
BIN_NAMES = ("0..199", "200..399", "400..599", "600..799", "800..999")
STRIDES = (1, 2, 3, 4)
BIN_LOSSES = tuple(Measure(name=f"loss {b}", words=f"held-out loss, timesteps {b}") for b in BIN_NAMES)
MOTION_ERROR = Measure(name="motion error", words="error of the motion")
IMAGE_LOSS = Measure(name="image loss", words="held-out loss of single images")
RIGHT = tuple(
    Measure(name=f"motion and speed right, stride {s}", words=f"motion and speed right, stride {s}", sign=1)
    for s in (4,)
)
COMPARISONS = {
    c.name: c
    for c in (
        Comparison(
            name="uniform_sampling",
            title="Explicit Uniform Sampling of timesteps",
            idea="full-uniform",
            without="full-independent",
            labels=("uniform", "independent"),
            measures=(
                Measure(
                    name="spread at rest", words="spread of batches' losses under fixed weights, relative"
                ),
                Measure(name="spread", words="spread of the training loss, relative"),
                LOSS,
                *BIN_LOSSES,
            ),
        ),
        Comparison(
            name="full_attention",
            title="3D full attention",
            idea="full-uniform",
            without="separated-uniform",
            labels=("3D full", "space and time in turn"),
            measures=(
                LOSS,
                *BIN_LOSSES,
                MOTION_ERROR,
            ),
        ),
        Comparison(
            name="frame_pack",
            title="Frame pack",
            idea="packed-uniform",
            without="full-uniform",
            labels=("1, 5, 9 and 17 frames packed", "17 frames alone"),
            measures=tuple(
                Measure(name=f"loss frames {n}", words=f"held-out loss, length {4 * n - 3}")
                for n in (1, 2, 3, 5)
            ),
        ),
        Comparison(
            name="zero_snr",
            title="Zero terminal SNR",
            idea="full-uniform",
            without="full-some-snr",
            labels=("zero", "as the betas leave it"),
            measures=(Measure(name="background error", words="error of the generated background"),),
        ),
        Comparison(
            name="progressive",
            title="Progressive resolution",
            idea="progressive",
            without="full-uniform",
            labels=("half size, then full", "full size"),
            measures=(LOSS, *BIN_LOSSES, MOTION_ERROR),
        ),
        Comparison(
            name="joint",
            title="Joint image and video training",
            idea="joint",
            without="full-uniform",
            labels=("clips and stills", "clips alone"),
            measures=(LOSS, Measure(name="loss frames 1", words="held-out loss, length 1"), MOTION_ERROR),
        ),
        Comparison(
            name="frame_rates",
            title="Hierarchical frame rates",
            idea="dual-rates",
            without="dual-one-rate",
            labels=("strides 1, 2, 4", "stride 2 alone"),
            measures=(
                *(Measure(name=f"loss stride {s}", words=f"held-out loss, stride {s}") for s in STRIDES),
                *RIGHT,
            ),
        ),
        Comparison(
            name="dual_channel",
            title="Dual-channel attention on a frozen image model",
            idea="dual-rates",
            without="single-rates",
            labels=("two channels, base frozen", "one channel, all trained"),
            measures=(
                LOSS,
                IMAGE_LOSS,
                *RIGHT,
            ),
        ),
        Comparison(
            name="frame_rate_token",
            title="Frame-rate token",
            idea="dual-rates",
            without="dual-untold",
            labels=("rate in the text", "always the same text"),
            measures=(
                LOSS,
                *(Measure(name=f"loss stride {s}", words=f"held-out loss, stride {s}") for s in (1, 2, 4)),
                *RIGHT,
            ),
        ),
        Comparison(
            name="frozen_base",
            title="Frozen base channel",
            idea="dual-rates",
            without="dual-all",
            labels=("two channels, base frozen", "two channels, all trained"),
            measures=(LOSS, IMAGE_LOSS, *RIGHT),
        ),
        Comparison(
            name="window_channel",
            title="Shifted windows in the temporal channel",
            idea="dual-window",
            without="dual-rates",
            labels=("windows of 4 x 4", "all places"),
            measures=(LOSS, *RIGHT),
        ),
        Comparison(
            name="local_channel",
            title="Local neighbourhood in the temporal channel",
            idea="dual-local",
            without="dual-rates",
            labels=("3 x 3 places", "all places"),
            measures=(LOSS, *RIGHT),
        ),
    )
}


# ---- statistics


def compared(comparison: Comparison, idea: Sequence[Outcome], without: Sequence[Outcome]) -> dict[str, Any]:
    """Both arms' means and their paired differences (idea - without), measure by measure."""
    pairs = ((comparison.idea, idea), (comparison.without, without))
    return {
        "title": comparison.title,
        "labels": comparison.labels,
        "arms": [
            {
                "name": name,
                "trained_parameters": runs[0].trained,
                "cpu_seconds_per_step": float(np.median([run.seconds_per_step for run in runs])),
            }
            for name, runs in pairs
        ],
        "measures": [difference(m, idea, without) for m in comparison.measures],
    }


def difference(measure: Measure, idea: Sequence[Outcome], without: Sequence[Outcome]) -> dict[str, Any]:
    """Means over everything; the difference with two 95 % intervals: over seeds (Student's t of the runs'
    means) and over held-out clips or prompts (bootstrap of each one's mean over the seeds)."""
    first, second = (np.array([run.figures[measure.name] for run in runs]) for runs in (idea, without))
    paired = first - second  # [seeds, items]
    over_items = None
    if paired.shape[1] > 1:
        bootstrap = mean_interval(paired.mean(0).tolist())
        over_items = [bootstrap.low, bootstrap.high]
    over_seeds = seed_interval(paired.mean(1))
    return {
        "name": measure.name,
        "words": measure.words,
        "better": "more" if measure.sign > 0 else "less",
        "idea": float(first.mean()),
        "without": float(second.mean()),
        "difference": float(paired.mean()),
        "over_seeds": over_seeds,
        "over_items": over_items,
        "seeds": paired.shape[0],
        "items": paired.shape[1],
        "verdict": verdict(float(paired.mean()) * measure.sign, [over_seeds, over_items], paired.shape[1]),
    }


def seed_interval(values: np.ndarray) -> list[float] | None:
    """95 % interval of the mean of a few runs; None for one run alone."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    t = STUDENT_T.get(freedom) or student_t(0.975, freedom)
    half = t * float(values.std(ddof=1)) / len(values) ** 0.5
    return [float(values.mean()) - half, float(values.mean()) + half]


def verdict(gain: float, intervals: Sequence[list[float] | None], items: int) -> str:
    """ "better" or "worse" only where every interval there is excludes 0."""
    over_seeds, over_items = intervals
    needed = [over_seeds] if items == 1 else [over_seeds, over_items]
    if any(i is None or i[0] <= 0 <= i[1] for i in needed):
        return "open"
    return "better" if gain > 0 else "worse"


# ---- table


def markdown(content: dict[str, Any]) -> str:
    """One table per comparison."""
    return "\n".join(_table(result) for result in content["comparisons"].values())


def _table(result: dict[str, Any]) -> str:
    idea, without = result["labels"]
    lines = [
        f"### {result['title']}",
        "",
        f"| measure (better) | {idea} | {without} | difference | over seeds | over clips | idea is |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in result["measures"]:
        intervals = (_span(m["over_seeds"], m["seeds"]), _span(m["over_items"], m["items"]))
        cells = (f"{m['words']} ({m['better']})", _number(m["idea"]), _number(m["without"]))
        row = (*cells, f"{m['difference']:+.4f}", *intervals, m["verdict"])
        lines.append(f"| {' | '.join(row)} |")
    costs = ", ".join(
        f"{label}: {arm['trained_parameters']:,} parameters learn, "
        f"{arm['cpu_seconds_per_step']:.2f} CPU seconds a step"
        for label, arm in zip(result["labels"], result["arms"], strict=True)
    )
    return "\n".join([*lines, "", f"{costs}.", ""])


def _number(value: float) -> str:
    return f"{value:.4f}"


def _span(interval: list[float] | None, count: int) -> str:
    return "" if interval is None else f"{interval[0]:+.4f}..{interval[1]:+.4f} (N {count})"


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Put the tables behind the marker of a document, to its end, and the plot into its images."""
    before, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"{path} has no line {MARKER}")
    draw(content, path.parent / "images" / "ablations.png")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{MARKER}\n\n{markdown(content)}", encoding="utf-8")


# ---- plot


def draw(content: dict[str, Any], path: Path) -> None:
    """What should be small, as change in percent of the arm without the idea; shares of videos and what
    a run has one of are in the table alone. Wide lines: interval over seeds, thin: over clips."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = list(content["comparisons"].values())
    columns = 2 if len(results) > 1 else 1
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, result in zip(panels, results, strict=False):
        _panel(axes, result)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: Any, result: dict[str, Any]) -> None:
    shown = [m for m in result["measures"] if m["better"] == "less" and m["items"] > 1 and m["without"]]
    for row, m in enumerate(shown):
        unit = 100 / abs(m["without"])
        colour = {"better": "#1a7f4b", "worse": "#b3261e", "open": "#6b7280"}[m["verdict"]]
        for interval, width, alpha in ((m["over_seeds"], 6, 0.3), (m["over_items"], 2, 0.9)):
            if interval is not None:
                axes.plot(
                    [unit * x for x in interval], [row, row], color=colour, linewidth=width, alpha=alpha
                )
        axes.plot(unit * m["difference"], row, "o", color=colour, markersize=6)
    axes.axvline(0, color="#9ca3af", linewidth=1)
    axes.set_yticks(range(len(shown)), [m["words"] for m in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"change by '{result['labels'][0]}' against '{result['labels'][1]}', %", fontsize=8)
    axes.set_title(result["title"], fontsize=10)
    axes.grid(axis="x", linewidth=0.5, alpha=0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
