"""Compare models: `python -m benchmarks run demo` makes the videos, the numbers and the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import registry
from benchmarks.comparison import compare
from benchmarks.engines import ENGINES, run_with
from benchmarks.metrics import METRICS
from benchmarks.report import comparison_table, up_to_date, write_reports
from benchmarks.runner import Outcome
from benchmarks.storage import RunFolder
from benchmarks.suites import SPLITS, Suite, items, load_suite, read_prompts, suite_names
from shared.config_cli import FlagParser, run
from shared.errors import BatchError, SettingError
from shared.files import write_json

OVERRIDES = ("models", "num_prompts", "num_videos_per_prompt", "num_clips", "seed", "warm_up", "prompts")


def build_parser() -> FlagParser:
    """The verbs and their flags."""
    parser = FlagParser(prog="cogvideo-bench", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, words, add in (
        ("run", "make what a suite asks for, measure it and write the report", _add_run),
        ("report", "measure a run again from its frames and write its report", _add_report),
        ("compare", "two runs, prompt by prompt", _add_compare),
        ("list", "the models, suites and metrics there are", _add_list),
    ):
        verb = verbs.add_parser(name, help=words, description=words)
        add(verb)
        verb.add_argument("--json", action="store_true", help="one JSON object instead of sentences")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", metavar="SUITE", help="a name of `list`, or the path of a suite's JSON file")
    parser.add_argument("--output_path", type=Path, help="the run's folder (default: out/SUITE)")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="instead of the suite's; see `list`")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompts", choices=SPLITS, help="which prompts of the shapes world")
    given.add_argument("--prompt_file", type=Path, help="prompts of your own, one a line")
    parser.add_argument("--num_prompts", type=int)
    parser.add_argument("--num_videos_per_prompt", type=int)
    parser.add_argument("--num_clips", type=int, help="clips that go through each model's codec")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--warm_up", action=argparse.BooleanOptionalAction, default=None,
                        help="make one video per model first that is not timed")  # fmt: skip
    parser.add_argument("--engine", choices=ENGINES, default="local", help="who makes the videos")
    parser.add_argument("--workers", type=int, default=1, help="for the engine ray")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--dry_run", action="store_true", help="say what would be made, and stop")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="RUN")
    parser.add_argument("second", type=Path, metavar="RUN")
    parser.add_argument("--output_path", type=Path, help="also write the differences to this JSON file")


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A model may also be FAMILY:FOLDER, e.g. cogvideox:weights/CogVideoX-2b."


def requested_suite(options: argparse.Namespace) -> Suite:
    """The suite with what the flags change in it."""
    suite = load_suite(options.suite)
    given = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    if "models" in given:
        given["models"] = tuple(given["models"])
    if options.prompt_file is not None:
        texts = read_prompts(options.prompt_file)
        given |= {"prompts": texts, "num_prompts": given.get("num_prompts", len(texts))}
    return replace(suite, **given)


def run_verb(options: argparse.Namespace) -> None:
    suite = requested_suite(options)
    for model in suite.models:
        registry.resolve(model)  # a wrong name is better known before hours of work
    folder = RunFolder(path=options.output_path or Path("out") / suite.name)
    if options.dry_run:
        say_plan(suite, folder, options.json)
        return
    if options.workers < 1:
        raise SettingError(f"workers must be at least 1, got {options.workers}")
    outcome = run_with(
        options.engine, suite, folder, build=registry.build, workers=options.workers, quiet=options.quiet
    )
    if outcome is not None:
        finish(suite, folder, outcome, options.json)


def finish(suite: Suite, folder: RunFolder, outcome: Outcome, as_json: bool) -> None:
    """Reports, unless nothing changed; BatchError when items failed."""
    page = folder.path / "report.html"
    if outcome.made or outcome.failed or not up_to_date(folder):
        write_reports(folder, descriptions(suite.models))
    counts = {"made": outcome.made, "kept": outcome.kept, "failed": outcome.failed}
    if not (as_json and outcome.failed):  # the error will be the one JSON object
        say({"ok": True, **counts, "report": str(page)}, [outcome.summary, f"report: {page}"], as_json)
    if outcome.failed:
        first = next(iter(outcome.failed.items()))
        raise BatchError(
            f"{len(outcome.failed)} items failed, listed in {folder.index}; first {': '.join(first)}"
        )


def say_plan(suite: Suite, folder: RunFolder, as_json: bool) -> None:
    work = items(suite)
    models = ", ".join(suite.models)
    lines = [f"{len(work)} videos and {suite.num_clips} clips for each of {models}, in {folder.path}"]
    lines += [f"  seed {item.seed}: {item.prompt}" for item in work]
    plan = {
        "models": list(suite.models),
        "prompts": [[i.prompt, i.seed] for i in work],
        "folder": str(folder.path),
    }
    say(plan, lines, as_json)


def report_verb(options: argparse.Namespace) -> None:
    folder = RunFolder(path=options.run)
    results = write_reports(folder, descriptions(folder.read_index()["models"]))
    page = folder.path / "report.html"
    say({"ok": True, "report": str(page), "models": results["models"]}, [f"report: {page}"], options.json)


def compare_verb(options: argparse.Namespace) -> None:
    differences = compare(RunFolder(path=options.first), RunFolder(path=options.second))
    if options.output_path is not None:
        write_json(options.output_path, {"differences": differences})
    say({"ok": True, "differences": differences}, [comparison_table(differences)], options.json)


def list_verb(options: argparse.Namespace) -> None:
    groups = {
        "models": {name: preset.description for name, preset in registry.PRESETS.items()}
        | {f"{family}:FOLDER": "weights of your own" for family in registry.FAMILIES},
        "suites": {name: load_suite(name).description for name in suite_names()},
        "metrics": {name: f"{metric.recipe_id}  {metric.recipe}" for name, metric in METRICS.items()},
    }
    lines = [
        line
        for title, entries in groups.items()
        for line in (title, *(f"  {name:<32} {words}" for name, words in entries.items()), "")
    ]
    say(groups, lines[:-1], options.json)


def descriptions(models: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    """A line on each model that the registry knows."""
    return {name: registry.PRESETS[name].description for name in models if name in registry.PRESETS}


def say(content: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(content, ensure_ascii=False) if as_json else "\n".join(lines))


VERBS = {"run": run_verb, "report": report_verb, "compare": compare_verb, "list": list_verb}


def _main(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    VERBS[options.verb](options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    return run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
