"""The verb `report`: measure a run again from its frames and write its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import registry
from benchmarks.commands.run import check_failed
from benchmarks.features.files import FeatureFiles
from benchmarks.report import write_reports
from benchmarks.storage import RunFolder
from shared.errors import SettingError
from shared.verbs import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--feature_files", nargs="+", metavar="KIND=PATH",
                        help="instead of the suite's, e.g. i3d=PATH clip=FOLDER; see `list`")  # fmt: skip
    parser.add_argument("--page_mb", type=float, metavar="MB",
                        help="films and pictures in the page, about (default: 5)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    folder = RunFolder(path=options.run)
    if options.page_mb is not None and not 0 <= options.page_mb < 1e6:
        raise SettingError(f"page_mb must be 0 or more and below 1e6, got {options.page_mb:g}")
    room = None if options.page_mb is None else int(1e6 * options.page_mb)
    files = None if options.feature_files is None else FeatureFiles.parse(options.feature_files)
    models = folder.read_index()["models"]
    costs = registry.cost_models(models)
    results = write_reports(folder, registry.descriptions(models), files, costs, room=room)
    page = folder.path / "report.html"
    if not (options.json and results["failed"]):  # the error will be the one JSON object
        say(options, {"ok": True, "report": str(page), "models": results["models"]}, [f"report: {page}"])
    check_failed(folder, results["failed"])
