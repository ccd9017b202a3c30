"""Writes what a run found: results.json for programs, report.md for reviews, report.tex for papers, and
report.html for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import wording
from benchmarks.elsewhere import imported_tables
from benchmarks.evaluation import evaluate
from benchmarks.features.files import FeatureFiles
from benchmarks.latex import latex
from benchmarks.metrics import METRICS
from benchmarks.page import render_page
from benchmarks.published import PUBLISHED
from benchmarks.runner import note_damaged
from benchmarks.storage import RunFolder, read_imported, read_json, state
from shared.files import atomic_path, write_json

Results = Mapping[str, Any]
REPORTS = ("results.json", "per_item.json", "sets.json", "report.md", "report.tex", "report.html")


def write_reports(
    folder: RunFolder,
    descriptions: Mapping[str, str] | None = None,
    files: FeatureFiles | None = None,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    room: int | None = None,
) -> dict[str, Any]:
    """Measure a run from its frames and write all its reports; returns what results.json holds.

    `descriptions` adds a line on each model to the page; `files` are used instead of those that the suite
    names; `costs` is what the cost model says of each model's stages (`benchmarks.expected.cost_model`);
    `room` is how many bytes of films and pictures the page may have.
    """
    measured = evaluate(folder, files)
    for name, row in measured["models"].items():
        row["cost_model"] = dict((costs or {}).get(name, {}))
    note_damaged(folder, measured["failed"])
    measured |= {"state": state(folder), "imported": read_imported(folder)}
    write_text(folder.path / "report.md", markdown(measured))
    write_text(folder.path / "report.tex", latex(measured))
    write_text(folder.path / "report.html", render_page(folder, measured, descriptions, room=room))
    return write_results(folder, measured)


def write_results(folder: RunFolder, measured: Mapping[str, Any]) -> dict[str, Any]:
    """results.json, and beside it every item's values in per_item.json and the replicates of the distances in
    sets.json; returns the former's content, which is written last, since `up_to_date` believes it."""
    results = {name: value for name, value in measured.items() if name not in ("items", "sets")}
    write_json(folder.path / "per_item.json", measured["items"])
    write_json(folder.path / "sets.json", measured["sets"])
    write_json(folder.path / "results.json", results)
    return results


def up_to_date(folder: RunFolder) -> bool:
    """Do the reports show this run, measured by these recipes?"""
    paths = [folder.path / name for name in REPORTS]
    if not all(path.is_file() for path in paths):
        return False
    results, index = read_json(paths[0]), folder.read_index()
    if results.get("state") != state(folder):
        return False
    recipe = results["recipe"]
    files = FeatureFiles.parse(index["suite"].get("feature_files", ()))
    ids = {name: metric.recipe_id for name, metric in files.metrics().items()}
    same = all(recipe[name] == index[name] for name in ("suite", "command", "environment"))
    return same and {name: metric["id"] for name, metric in recipe["metrics"].items()} == ids


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def markdown(results: Results) -> str:
    """The report as Markdown: findings, numbers, stages, notes, and how to repeat it."""
    parts = [
        f"# {results['recipe']['suite']['name']}",
        " ".join(wording.headline(results)),
        "## Numbers",
        metric_table(results),
        "Each number: value, 95 % interval over prompts, n. Recipes are in `results.json`.",
        *(["## Differences", difference_table(results)] if results["differences"] else []),
        "## Stages of one video",
        stage_table(results),
        *(["## What the cost model expects", cost_table(results)] if has_costs(results) else []),
        *(
            ["## Measured elsewhere, on these videos", imported_section(results)]
            if imported_tables(results)
            else []
        ),
        *(["## Left out", failed_table(results)] if results["failed"] else []),
        *(["## Skipped", skipped_list(results)] if results["skipped"] else []),
        "## Notes",
        "\n".join(f"- {note}" for note in results["notes"]) or "None.",
        "## Published elsewhere: not the same protocol",
        published_table(),
        "## Repeat it",
        f"```sh\n{results['recipe']['command']}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def metric_table(results: Results) -> str:
    columns = {**results["models"], **results["references"]}
    names = [name for name in METRICS if any(name in row["metrics"] for row in columns.values())]
    rows = [
        [
            wording.titled(METRICS[name]),
            *(value_cell(name, row["metrics"].get(name)) for row in columns.values()),
        ]
        for name in names
    ]
    return table(["metric", *columns], rows)


def value_cell(name: str, value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    metric = METRICS[name]
    return f"{wording.number(metric, value['value'])} ({wording.span(metric, value)}; {value['n']})"


def difference_table(results: Results) -> str:
    return comparison_table(results["differences"])


def comparison_table(differences: Sequence[Mapping[str, Any]]) -> str:
    """Differences as a Markdown table; it reads well on a terminal too."""
    rows = []
    for entry in differences:
        metric = METRICS[entry["metric"]]
        pair = f"{entry['a']} − {entry['b']}"
        if "refused" in entry:
            rows.append([metric.title, pair, "refused", entry["refused"]])
        else:
            value = f"{wording.number(metric, entry['value'], sign=True)}"
            rows.append(
                [metric.title, pair, f"{value} ({wording.span(metric, entry, sign=True)})", entry["verdict"]]
            )
    return table(["metric", "pair", "difference", "what it shows"], rows)


def stage_table(results: Results) -> str:
    rows = [
        [model, stage, wording.seconds(cost["seconds"]), peak_cell(cost), wording.rate(cost)]
        for model, row in results["models"].items()
        for stage, cost in row["stages"].items()
    ]
    return (
        table(["model", "stage", "seconds", "peak memory", "rate"], rows)
        if rows
        else "No stages were reported."
    )


def has_costs(results: Results) -> bool:
    return any(row["cost_model"] for row in results["models"].values())


def cost_table(results: Results) -> str:
    rows = [
        [model, stage, wording.counted(cost["steps"], cost["unit"]), wording.operations(cost["flops"]),
         *(wording.size(cost[kind]) for kind in ("weight_bytes", "cache_bytes", "work_bytes")),
         *(wording.seconds(value) for value in cost["least_seconds"].values())]
        for model, row in results["models"].items()
        for stage, cost in row["cost_model"].items()
    ]  # fmt: skip
    first = next(cost for row in results["models"].values() for cost in row["cost_model"].values())
    devices = [f"least seconds, {name}" for name in first["least_seconds"]]
    return table(["model", "stage", "in turn", "work", "weights", "cache", "held at once", *devices], rows)


def imported_section(results: Results) -> str:
    """Imported scores, one table for each protocol."""
    parts = []
    for one in imported_tables(results):
        parts += [
            f"### {one.title}",
            " ".join(one.facts),
            table(list(one.header), [list(r) for r in one.rows]),
        ]
        parts += ["\n".join(f"- {finding}" for finding in one.findings)] if one.findings else []
    return "\n\n".join(parts)


def failed_table(results: Results) -> str:
    """Damaged and failed items, each with its reason."""
    return table(["item", "reason"], [[item, reason] for item, reason in results["failed"].items()])


def skipped_list(results: Results) -> str:
    """The metrics that were not measured, by what they need."""
    groups = wording.skipped(results)
    return "\n".join(f"- {', '.join(names)}: {reason}" for reason, names in groups.items())


def published_table() -> str:
    rows = [[p.model, p.protocol, p.score, p.source, p.conflict or "–"] for p in PUBLISHED]
    return table(["model", "protocol", "score", "source", "conflict"], rows)


def peak_cell(cost: Mapping[str, Any]) -> str:
    return wording.size(cost["peak_bytes"]) if cost["peak_bytes"] else "–"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
