"""The verb `vbench`: videos to VBench, and its results back beside a run's own numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.storage import RunFolder
from benchmarks.vbench import export_run, import_results
from shared.errors import SettingError
from shared.json_files import shaped
from shared.verbs import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", required=True, metavar="export|import")
    out = ways.add_parser("export", help="write a model's videos as VBench reads them")
    out.add_argument("run", type=Path, metavar="RUN")
    out.add_argument("--model", required=True, help="of the run")
    out.add_argument("--output_path", type=Path, required=True, help="the folder to write")
    back = ways.add_parser("import", help="keep VBench's *_eval_results.json with the run")
    back.add_argument("run", type=Path, metavar="RUN")
    back.add_argument("results", type=Path, metavar="RESULTS.json")
    back.add_argument("--model", required=True, help="of the run")
    back.add_argument(
        "--manifest", type=Path, help="the export's vbench.json: ties the scores to these videos"
    )
    back.add_argument("--made_with", default="", help="VBench's version and machine, in your words")
    for own in (out, back):
        own.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    folder = RunFolder(path=options.run)
    if options.way == "export":
        with shaped(folder.path, SettingError):
            made = export_run(folder, options.model, options.output_path)
        where = options.output_path / "videos"
        lines = [f"{made['videos']} videos in {where}, for VBench's {made['branch']} branch"]
        say(options, made, [*lines, f"mode: {made['mode']}", *made["notes"]])
        return
    with shaped("the run, the results or the manifest", SettingError):
        kept = import_results(
            folder, options.model, options.results, manifest=options.manifest, made_with=options.made_with
        )
    lines = [f"{name}: {score['value']:.4f}" for name, score in kept["scores"].items()]
    say(options, kept, [*lines, f"kept in {folder.imported}; write the report again to see it there"])
