"""The verb `convert`: a model folder of the released weights, or the way back."""

from __future__ import annotations

import argparse
from pathlib import Path

from cogvideo_ar.part_paths import add_part_flags, chosen_parts, refuse_parts
from shared.verbs import add_output_flags, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model_path", required=True, help="a folder with the released parts; with --to sat any model"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--to", choices=("own", "sat"), default="own", help="layout: own, or the released parts"
    )
    parser.add_argument(
        "--dtype", help="of the stored weights: float32, bfloat16 or float16 (default: as is)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    add_part_flags(parser)
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Write a model folder and say where."""
    from cogvideo_ar.formats import convert_folder, export_folder
    from shared.runtime import parse_dtype

    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    source, target, overwrite = options.model_path, options.output_path, options.overwrite
    if options.to == "own":
        path = convert_folder(source, target, parts=chosen_parts(options), dtype=dtype, overwrite=overwrite)
    else:
        refuse_parts(options, "for --to own")
        path = export_folder(source, target, dtype=dtype, overwrite=overwrite)
    say(options, {"ok": True, "exit_code": 0, "path": str(path)}, [str(path)])
