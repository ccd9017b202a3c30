"""The verb `report`: measure a run again from its frames and write its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import registry
from benchmarks.report import write_reports
from benchmarks.storage import RunFolder
from shared.verbs import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    folder = RunFolder(path=options.run)
    results = write_reports(folder, registry.descriptions(folder.read_index()["models"]))
    page = folder.path / "report.html"
    say(options, {"ok": True, "report": str(page), "models": results["models"]}, [f"report: {page}"])
