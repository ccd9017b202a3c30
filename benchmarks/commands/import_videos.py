"""The verb `import_videos`: a run of videos that were made elsewhere, beside models of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import registry
from benchmarks.commands.run import finish
from benchmarks.imports import ImportedVideos
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder
from benchmarks.windows import Window
from shared.config_io import to_plain
from shared.files import write_json
from shared.protocol import VideoGenerator
from shared.verbs import add_output_flags

SUITE_FILE = "suite.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of videos, or of folders of png frames")
    parser.add_argument("--prompt_file", type=Path,
                        help="what each file shows: .csv, .json, .jsonl or .txt (default: a prompts file in "
                        "FOLDER, else sidecars or the files' names)")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL",
                        help="that make the same prompts, to be compared; see `list`")  # fmt: skip
    parser.add_argument("--window", type=Window.parse, metavar="SECONDS,FPS,HEIGHT,WIDTH",
                        help="bring all videos to this before they are measured")  # fmt: skip
    parser.add_argument("--output_path", type=Path, help="the run's folder (default: out/FOLDER's name)")
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    videos = ImportedVideos.open(options.folder, options.prompt_file)
    for model in options.models:
        registry.resolve(model)
    suite = videos.suite(options.folder.resolve().name, tuple(options.models), options.window)
    folder = RunFolder(path=options.output_path or Path("out") / suite.name)

    def build(name: str) -> VideoGenerator:
        return videos if name == videos.name else registry.build(name)

    outcome = run_suite(suite, folder, build=build, quiet=options.quiet)
    write_json(folder.path / SUITE_FILE, to_plain(suite))
    finish(suite, folder, outcome, options)
