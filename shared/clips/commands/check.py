"""The verb `check`: what is wrong with a list of clips, and what to do about it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from shared.clips.measures import Measured

SCORES, REPORT = "scores.jsonl", "check.json"


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """What the verbs that measure clips share."""
    parser.add_argument("--input_path", type=Path, required=True,
                        help="a folder of clips, its metadata.jsonl, or its videos.txt")  # fmt: skip
    parser.add_argument(
        "--scores", type=Path, help=f"where measures are kept (default: {SCORES} beside the clips)"
    )
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that decode beside this one (default: 0)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shared.clips.checks import KINDS, CheckSettings

    usual = CheckSettings()
    add_input_flags(parser)
    parser.add_argument("--report", type=Path, help=f"the report (default: {REPORT} beside the clips)")
    parser.add_argument("--min_frames", type=int, default=usual.min_frames, help="default: %(default)s")
    parser.add_argument("--min_seconds", type=float, default=usual.min_seconds, help="default: %(default)s")
    parser.add_argument("--static_below", type=float, default=usual.static_below,
                        help="levels (of 255) by which a frame differs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--near_levels", type=float, default=usual.near_levels,
                        help="levels within which two clips are one (default: %(default)s)")  # fmt: skip
    parser.add_argument("--allow", nargs="+", action="extend", default=[], metavar="KIND",
                        help=f"faults that are told but do not count: {', '.join(KINDS)}")  # fmt: skip
    add_output_flags(parser)


def measured_clips(options: argparse.Namespace) -> list[Measured]:
    """The clips of `add_input_flags`, measured; files that are not there are among them."""
    from shared.clips.dataset import folder_of, read_clips
    from shared.clips.measures import measure_all
    from shared.files import check_suffix
    from shared.runtime import check_workers

    check_workers(options.num_workers)
    clips = read_clips(options.input_path, must_exist=False)
    scores = check_suffix(options.scores or folder_of(options.input_path) / SCORES, ".jsonl", "scores")
    return measure_all(clips, scores, num_workers=options.num_workers, quiet=options.quiet or options.json)


def run(options: argparse.Namespace) -> int:
    """Exit code 7 where a clip is bad."""
    from shared.clips.checks import CheckSettings, find_faults, lines, report
    from shared.clips.dataset import folder_of
    from shared.errors import BatchError
    from shared.files import check_suffix, write_json

    settings = CheckSettings(
        min_frames=options.min_frames,
        min_seconds=options.min_seconds,
        static_below=options.static_below,
        near_levels=options.near_levels,
    )
    path = check_suffix(options.report or folder_of(options.input_path) / REPORT, ".json", "report")
    find_faults([], settings, options.allow)  # refuses an unknown kind before anything is decoded
    measured = measured_clips(options)
    content = report(measured, find_faults(measured, settings, options.allow))
    code = 0 if content["ok"] else BatchError.exit_code
    content = {"ok": content["ok"], "exit_code": code, **content, "settings": asdict(settings)}
    write_json(path, content)
    say(options, content | {"report": str(path)}, [*lines(content), f"report: {path}"])
    return code
