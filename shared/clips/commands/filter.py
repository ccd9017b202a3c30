"""The verb `filter`: a new list of the clips that keep all bounds, over the same files."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from shared.clips.commands.check import add_input_flags, measured_clips
from shared.verbs import add_output_flags, say

HELP = {
    "min_motion": "frame heights per second; about 0.02 leaves still pictures out",
    "max_cuts": "changes of scene; 0 leaves clips of one scene",
    "min_aspect": "width over height",
    "min_caption_words": "words; a Chinese character counts as one",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shared.clips.filters import Bounds

    add_input_flags(parser)
    parser.add_argument("--output_path", type=Path, required=True, help="the metadata.jsonl to write")
    for field in fields(Bounds):
        kind = int if str(field.type).startswith("int") else float
        parser.add_argument(f"--{field.name}", type=kind, metavar="N", help=HELP.get(field.name))
    parser.add_argument("--overwrite", action="store_true", help="replace a list that is there")
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Clips that cannot be read are left out, and told."""
    from shared.clips.filters import Bounds, apply_bounds, write_list
    from shared.errors import OutputPathError, SettingError

    target: Path = options.output_path
    if target.suffix != ".jsonl":
        raise SettingError(f"output_path must be a .jsonl file, as in good/metadata.jsonl, got {target}")
    if target.exists() and not options.overwrite:
        raise OutputPathError(f"{target} already exists; choose another name or pass --overwrite")
    bounds = Bounds(**{field.name: getattr(options, field.name) for field in fields(Bounds)})
    result = apply_bounds(measured_clips(options), bounds)
    write_list(result.kept, target, overwrite=options.overwrite)
    content = result.summary()
    reasons = [f"{name}: {count}" for name, count in content["reasons"].items()]
    said = f"{content['num_kept']} of {content['num_clips']} clips in {target}"
    lines = [said + (f"; left out by {', '.join(reasons)}" if reasons else "")]
    say(
        options, {"ok": True, "exit_code": 0, "path": str(target), "bounds": bounds.given(), **content}, lines
    )
