"""The verb `compare`: two runs, prompt by prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.comparison import compare
from benchmarks.report import comparison_table
from benchmarks.storage import RunFolder
from shared.errors import SettingError
from shared.files import check_suffix, write_json
from shared.json_files import shaped
from shared.verbs import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="RUN")
    parser.add_argument("second", type=Path, metavar="RUN")
    parser.add_argument("--output_path", type=Path, help="also write the differences to this JSON file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    if options.output_path is not None:
        check_suffix(options.output_path, ".json", "output_path")
    with shaped(f"{options.first} or {options.second}", SettingError):
        differences = compare(RunFolder(path=options.first), RunFolder(path=options.second))
    if options.output_path is not None:
        write_json(options.output_path, {"differences": differences})
    say(options, {"ok": True, "differences": differences}, [comparison_table(differences)])
