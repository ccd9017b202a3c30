"""The verb `run`: make what a suite asks for, measure it and write the report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks import registry
from benchmarks.engines import ENGINES, run_with
from benchmarks.features.files import FeatureFiles
from benchmarks.report import up_to_date, write_reports
from benchmarks.storage import RunFolder
from benchmarks.suites import SPLITS, Suite, items, load_suite
from benchmarks.windows import Window
from benchmarks.work import Outcome
from shared.errors import BatchError, SettingError
from shared.generation_cli import read_prompt_file
from shared.verbs import add_output_flags, say

OVERRIDES = (
    "models",
    "num_prompts",
    "num_videos_per_prompt",
    "num_clips",
    "seed",
    "warm_up",
    "prompts",
    "feature_files",
    "interleave",
    "window",
)
FILES_HELP = "nets that some metrics need, e.g. i3d=PATH clip=FOLDER; see `list feature_files`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--interleave", action=argparse.BooleanOptionalAction, default=None,
                        help="all models in memory, taking turns: a fair measure of speed")  # fmt: skip
    parser.add_argument("--window", type=Window.parse, metavar="SECONDS,FPS,HEIGHT,WIDTH",
                        help="bring all videos to this before they are measured")  # fmt: skip
    parser.add_argument("--feature_files", nargs="+", metavar="KIND=PATH", help=FILES_HELP)
    parser.add_argument("--engine", choices=ENGINES, default="local", help="who makes the videos")
    parser.add_argument("--workers", type=int, default=1, help="for the engine ray")
    parser.add_argument("--dry_run", action="store_true", help="say what would be made, and stop")
    add_output_flags(parser)


def requested_suite(options: argparse.Namespace) -> Suite:
    """The suite with what the flags change in it."""
    suite = load_suite(options.suite)
    given = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    if "models" in given:
        given["models"] = tuple(given["models"])
    if "feature_files" in given:
        given["feature_files"] = tuple(given["feature_files"])
    if options.prompt_file is not None:
        texts = tuple(read_prompt_file(options.prompt_file))
        given |= {"prompts": texts, "num_prompts": given.get("num_prompts", len(texts))}
    return replace(suite, **given)


def run(options: argparse.Namespace) -> None:
    suite = requested_suite(options)
    for model in suite.models:
        registry.resolve(model)  # a wrong name is better known before hours of work
    FeatureFiles.parse(suite.feature_files)
    folder = RunFolder(path=options.output_path or Path("out") / suite.name)
    if options.dry_run:
        say_plan(suite, folder, options)
        return
    if options.workers < 1:
        raise SettingError(f"workers must be at least 1, got {options.workers}")
    outcome = run_with(
        options.engine, suite, folder, build=registry.build, workers=options.workers, quiet=options.quiet
    )
    if outcome is not None:
        finish(suite, folder, outcome, options)


def finish(suite: Suite, folder: RunFolder, outcome: Outcome, options: argparse.Namespace) -> None:
    """Reports, unless nothing changed; BatchError when items failed."""
    page = folder.path / "report.html"
    failed = outcome.failed
    if outcome.made or outcome.failed or not up_to_date(folder):
        costs = registry.cost_models(folder.read_index()["models"])
        failed = write_reports(folder, registry.descriptions(suite.models), costs=costs)["failed"]
    counts = {"made": outcome.made, "kept": outcome.kept, "failed": failed}
    if not (options.json and failed):  # the error will be the one JSON object
        lines = [f"failed: {item}: {reason}" for item, reason in failed.items()]
        say(
            options, {"ok": True, **counts, "report": str(page)}, [*lines, outcome.summary, f"report: {page}"]
        )
    check_failed(folder, failed)


def check_failed(folder: RunFolder, failed: dict[str, str]) -> None:
    """BatchError when items failed."""
    if failed:
        first = next(iter(failed.items()))
        raise BatchError(f"{len(failed)} items failed, listed in {folder.index}; first {': '.join(first)}")


def say_plan(suite: Suite, folder: RunFolder, options: argparse.Namespace) -> None:
    work = items(suite)
    models = ", ".join(suite.models)
    lines = [f"{len(work)} videos and {suite.num_clips} clips for each of {models}, in {folder.path}"]
    lines += [f"  seed {item.seed}: {item.prompt}" for item in work]
    plan = {
        "models": list(suite.models),
        "prompts": [[i.prompt, i.seed] for i in work],
        "folder": str(folder.path),
    }
    say(options, plan, lines)
