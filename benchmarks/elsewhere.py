"""Scores that others gave this run's videos, as tables for all pages of the report: VBench's and people's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
DASH = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One source's scores: what must be known first, a row per score, what was found besides."""

    title: str
    facts: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    findings: Sequence[str] = ()


def imported_tables(results: Results) -> list[Table]:
    """What stands under "imported" in results.json, one table for each protocol; never beside our numbers."""
    found = list(results.get("imported", {}).values())
    studies = [one for one in found if one.get("kind") == "human study"]
    vbench: dict[tuple[str, ...], list[Results]] = {}
    for one in found:
        if one.get("kind") == "vbench":  # scores of one table were made by one protocol
            key = tuple(str(one.get(name)) for name in ("branch", "made_with", "prompts_sha256"))
            vbench.setdefault(key, []).append(one)
    return [vbench_table(group) for group in vbench.values()] + [study_table(one) for one in studies]


def vbench_table(scores: Sequence[Results]) -> Table:
    """Dimensions by models, of one branch and one version of VBench."""
    first = scores[0]
    samples = first["samples_per_prompt"]
    each = f"{samples} video{'s' if samples != 1 else ''} per prompt" if samples else "unknown samples"
    rows = [
        [name.replace("_", " "), *(vbench_cell(one["scores"].get(name)) for one in scores)]
        for name in dict.fromkeys(name for one in scores for name in one["scores"])
    ]
    return Table(
        title=f"VBench, {first['branch']} branch",
        facts=[
            f"Measured with: {first['made_with']}; {each}.",
            "From mp4 files, without intervals; scores of VBench's two branches do not compare.",
        ],
        header=["dimension", *(one["model"] for one in scores)],
        rows=rows,
    )


def vbench_cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return DASH
    count = f" ({score['n']} video{'s' if score['n'] != 1 else ''})" if score["n"] else ""
    return f"{score['value']:.4f}{count}"


def study_table(study: Results) -> Table:
    """Questions by models, with intervals over prompts; preferences and agreement in sentences."""
    scores = {model: columns for model, columns in study["scores"].items() if columns}
    questions = list(dict.fromkeys(name for columns in scores.values() for name in columns))
    return Table(
        title=f"Human study, {study['form']} form",
        facts=[
            f"{study['raters']} raters, {study['answers']} pairs answered in full; study {study['study']}.",
            f"Mean (95 % interval over prompts; prompts). Total: {study['total']}.",
        ],
        header=["question", *scores],
        rows=[
            [name.replace("_", " "), *(study_cell(c.get(name)) for c in scores.values())]
            for name in questions
        ],
        findings=[
            *map(preference_words, study["preferences"]),
            *agreement_words(study["agreement"]),
        ],
    )


def study_cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return DASH
    return f"{score['value']:.2f} ({score['low']:.2f} to {score['high']:.2f}; {score['n']})"


def preference_words(entry: Mapping[str, Any]) -> str:
    if "refused" in entry:
        return f"{entry['a']} against {entry['b']}: {entry['refused']}."
    share = f"{entry['value']:.0%} ({entry['low']:.0%} to {entry['high']:.0%}; {entry['n']} prompts)"
    return f"{entry['a']} preferred to {entry['b']}: {share}, no preference counting half."


def agreement_words(agreement: Mapping[str, Mapping[str, float | None]]) -> Iterable[str]:
    """One sentence, or why there is none."""
    known = {
        name: [f"{kind} {value:.2f}" for kind, value in kinds.items() if value is not None]
        for name, kinds in agreement.items()
    }
    words = [f"{name.replace('_', ' ')} {', '.join(kinds)}" for name, kinds in known.items() if kinds]
    if not words:
        return ["Agreement: unknown, since no pair was judged by two raters (or all judged alike)."]
    return [f"Agreement of raters (Krippendorff's alpha, Fleiss' kappa): {'; '.join(words)}."]
