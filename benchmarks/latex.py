"""The numbers as LaTeX tables for a paper; each stands alone and needs the package booktabs only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import wording
from benchmarks.elsewhere import imported_tables
from benchmarks.metrics import METRICS

Results = Mapping[str, Any]

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$",
    "×": r"$\times$", "–": "--", "“": "``", "”": "''",
}  # fmt: skip


def latex(results: Results) -> str:
    """The tables of numbers, differences and stages; each number names its recipe in a comment."""
    suite = results["recipe"]["suite"]["name"]
    parts = [
        f"% suite {one_line(suite)}; made by: {one_line(results['recipe']['command'])}",
        "% needs \\usepackage{booktabs}",
        table(
            ["Metric", *columns(results)],
            number_rows(results),
            f"Suite {suite}. In brackets: 95 % intervals over prompts.",
        ),
        recipe_comments(results),
    ]
    if results["differences"]:
        caption = "Differences, prompt by prompt, with 95 % intervals."
        parts.append(table(["Metric", "Pair", "Difference", "Finding"], difference_rows(results), caption))
    if rows := stage_rows(results):
        caption = "Cost of one video, mean seconds and greatest peak of each stage."
        parts.append(table(["Model", "Stage", "Seconds", "Peak memory", "Rate"], rows, caption))
    for one in imported_tables(results):
        caption = (
            f"Measured elsewhere, not comparable with the other tables. {one.title}. {' '.join(one.facts)}"
        )
        parts.append(table(list(one.header), one.rows, caption))
    return "\n\n".join(parts) + "\n"


def columns(results: Results) -> dict[str, Any]:
    return {**results["models"], **results["references"]}


def number_rows(results: Results) -> list[list[str]]:
    rows = list(columns(results).values())
    return [
        [wording.titled(METRICS[name]), *(number_cell(name, row["metrics"].get(name)) for row in rows)]
        for name in METRICS
        if any(name in row["metrics"] for row in rows)
    ]


def number_cell(name: str, value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    return f"{wording.number(METRICS[name], value['value'])} ({wording.span(METRICS[name], value)})"


def recipe_comments(results: Results) -> str:
    """What a reader of the source needs to make a number again."""
    measured = {name for row in columns(results).values() for name in row["metrics"]}
    lines = [
        f"% {name}: recipe {recipe['id']}, n = {counts(name, results)}"
        for name, recipe in results["recipe"]["metrics"].items()
        if name in measured
    ]
    return "\n".join(lines) or "% no metric was measured"


def counts(name: str, results: Results) -> str:
    found = [row["metrics"][name]["n"] for row in columns(results).values() if name in row["metrics"]]
    return "/".join(str(n) for n in dict.fromkeys(found))


def difference_rows(results: Results) -> list[list[str]]:
    rows = []
    for entry in results["differences"]:
        metric, pair = METRICS[entry["metric"]], f"{entry['a']} − {entry['b']}"
        if "refused" in entry:
            rows.append([metric.title, pair, "refused", entry["refused"]])
        else:
            value = wording.number(metric, entry["value"], sign=True)
            span = wording.span(metric, entry, sign=True)
            rows.append([metric.title, pair, f"{value} ({span})", entry["verdict"]])
    return rows


def stage_rows(results: Results) -> list[list[str]]:
    return [
        [model, stage, wording.seconds(cost["seconds"]), wording.peak({stage: cost}), wording.rate(cost)]
        for model, row in results["models"].items()
        for stage, cost in row["stages"].items()
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """One table environment, first column left, its cells escaped."""
    lines = [" & ".join(map(escaped, line)) + r" \\" for line in (header, *rows)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escaped(caption)}}}",
            rf"\begin{{tabular}}{{{'l' * len(header)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def escaped(text: str) -> str:
    """Any text as LaTeX that shows it."""
    return "".join(SPECIAL.get(letter, letter) for letter in one_line(text))


def one_line(text: str) -> str:
    return " ".join(text.split())
