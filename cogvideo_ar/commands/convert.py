"""The verb `convert`: a model folder of the released weights, or the way back."""

from __future__ import annotations

import argparse
from pathlib import Path

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
        "--stage1_path", type=Path, help="stage 1's checkpoint, where its folder does not say"
    )
    parser.add_argument("--stage2_path", type=Path, help="stage 2's checkpoint, likewise")
    parser.add_argument(
        "--dtype", help="of the stored weights: float32, bfloat16 or float16 (default: as is)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Write a model folder and say where."""
    from cogvideo_ar.formats import convert_folder, export_folder
    from shared.errors import SettingError
    from shared.runtime import parse_dtype

    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    source, target, overwrite = options.model_path, options.output_path, options.overwrite
    stages = {"stage1_path": options.stage1_path, "stage2_path": options.stage2_path}
    if options.to == "own":
        path = convert_folder(source, target, **stages, dtype=dtype, overwrite=overwrite)
    elif any(stages.values()):
        raise SettingError("--stage1_path and --stage2_path are for --to own")
    else:
        path = export_folder(source, target, dtype=dtype, overwrite=overwrite)
    say(options, {"ok": True, "exit_code": 0, "path": str(path)}, [str(path)])
