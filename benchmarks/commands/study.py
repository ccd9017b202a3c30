"""The verb `study`: blinded pairs for people to judge, and what their answers show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.human_study import FORMS, import_scores, make_study
from benchmarks.storage import RunFolder, read_json
from shared.errors import SettingError
from shared.json_files import shaped
from shared.verbs import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", required=True, metavar="make|score")
    make = ways.add_parser("make", help="write one page per rater, and the key")
    make.add_argument("run", type=Path, metavar="RUN")
    make.add_argument("--output_path", type=Path, required=True, help="the folder to write")
    make.add_argument("--form", choices=list(FORMS), default="cogvideo", help="whose questions")
    make.add_argument("--raters", type=int, default=1, help="pages; each has its own order and sides")
    make.add_argument("--pairs", type=int, default=0, help="draw so many pairs (default: all)")
    make.add_argument("--seed", type=int, default=0)
    score = ways.add_parser("score", help="unblind the answers and keep the scores with the run")
    score.add_argument("run", type=Path, metavar="RUN")
    score.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS.json")
    score.add_argument("--key", type=Path, required=True, help="key.json of the study")
    for own in (make, score):
        own.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    folder = RunFolder(path=options.run)
    if options.way == "make":
        with shaped(folder.path, SettingError):
            key = make_study(
                folder, options.output_path,
                form=options.form, seed=options.seed, raters=options.raters, pairs=options.pairs,
            )  # fmt: skip
        made = {"study": key["study"], "pairs": len(key["pairs"]), "sheets": len(key["sheets"])}
        lines = [f"{made['pairs']} pairs on {made['sheets']} pages in {options.output_path}"]
        say(options, made, [*lines, "key.json says who made which video: keep it from the raters"])
        return
    answers = [read_json(path) for path in options.answers]
    with shaped("the key or an answer", SettingError):
        found = import_scores(folder, read_json(options.key), answers)
    say(options, found, score_lines(found))


def score_lines(found: dict[str, Any]) -> list[str]:
    """The result in sentences."""
    lines = [f"{found['raters']} raters, {found['answers']} pairs answered; total: {found['total']}"]
    for model, columns in found["scores"].items():
        words = [f"{n} {c['value']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for n, c in columns.items()]
        lines.append(f"{model}: {', '.join(words)}")
    for entry in found["preferences"]:
        if "refused" in entry:
            lines.append(f"{entry['a']} against {entry['b']}: {entry['refused']}")
            continue
        share = f"{entry['value']:.0%} ({entry['low']:.0%} to {entry['high']:.0%}; {entry['n']} prompts)"
        lines.append(f"{entry['a']} preferred to {entry['b']}: {share}")
    for name, measures in found["agreement"].items():
        words = [f"{n} {'unknown' if v is None else f'{v:.2f}'}" for n, v in measures.items()]
        lines.append(f"agreement on {name}: {', '.join(words)}")
    return lines
