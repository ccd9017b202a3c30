"""The verb `convert`: a model in another layout, between ours, diffusers' and SAT's in every direction."""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import OutputPathError, SettingError
from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    import torch

    from cogvideox_diff.formats import ModelFolder
    from cogvideox_diff.model_files import Part, Tensors

LAYOUTS = ("ours", "diffusers", "sat")
GB = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model_path", required=True, help="demo or a model folder of any layout, told by content"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="the folder to write")
    parser.add_argument("--to", required=True, help=f"the layout to write: {', '.join(LAYOUTS)}")
    parser.add_argument("--dtype", help="of the stored weights: float32, bfloat16, float16 (default: as is)")
    parser.add_argument("--shard_gb", type=float, default=5.0,
                        help="diffusers: a larger part becomes several files (default: 5)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    parser.add_argument("--dry_run", action="store_true", help="check names and shapes, and write nothing")
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Everything is checked before the weights are read; a folder is whole or not there."""
    from shared.config_cli import pick
    from shared.runtime import parse_dtype

    pick("layout", options.to, {name: name for name in LAYOUTS})
    result = convert_model(
        options.model_path,
        options.output_path,
        to=options.to,
        stored=None if options.dtype is None else parse_dtype(options.dtype),
        shard_gb=options.shard_gb,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
    )
    say(options, {"ok": True, "exit_code": 0, **result}, _lines(result))


def convert_model(
    source: str | Path,
    output: Path,
    *,
    to: Any,
    stored: torch.dtype | None = None,
    shard_gb: float = 5.0,
    overwrite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the model in `source` to `output` in the layout `to`, one part in memory at a time.

    Tensors keep their numbers, and without `stored` their types. WeightsError where a tensor is unknown,
    absent or of another shape, OutputPathError where `output` is in the way or the disk too small."""
    from cogvideox_diff.formats import open_folder
    from cogvideox_diff.model_files import PARTS, check_layout, read_part, write_model
    from shared.files import atomic_path, remove_leftovers

    if not shard_gb > 0:
        raise SettingError(f"shard_gb must be positive, got {shard_gb}")
    folder = open_folder(source)
    _check_output(folder.path, output, overwrite)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        check_layout(to, folder.config)
    counts = {part: _counted(read_part(folder, part, device="meta"), stored) for part in PARTS}
    needed = sum(count["bytes"] for count in counts.values())
    _check_space(output, needed)
    result = {
        "path": str(output),
        "layouts": [folder.layout, to],
        "parts": counts,
        "bytes": needed,
        "notes": [str(warning.message) for warning in caught] + _notes(folder, to),
        "dry_run": dry_run,
    }
    if dry_run:
        return result
    remove_leftovers(output.parent, output.stem)
    with atomic_path(output, overwrite=overwrite) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # noted above
        write_model(
            temporary,
            to,
            folder.config,
            _reader(folder, read_part),
            folder.tokenizer,
            stored=stored,
            run=str(folder.trained_dtype).removeprefix("torch."),
            shard_bytes=int(shard_gb * GB),
        )
    return result


def _reader(folder: ModelFolder, read_part: Callable[..., Tensors]) -> Callable[[Part], Tensors]:
    return lambda part: read_part(folder, part)


def _counted(tensors: Tensors, stored: torch.dtype | None) -> dict[str, int]:
    sizes = [x.numel() * (x if stored is None else x.to(stored)).element_size() for x in tensors.values()]
    return {
        "tensors": len(tensors),
        "parameters": sum(x.numel() for x in tensors.values()),
        "bytes": sum(sizes),
    }


def _notes(folder: ModelFolder, to: str) -> list[str]:
    from cogvideox_diff.config import SAT_FINAL_NORM_EPS

    if to == "diffusers" and folder.config.transformer.final_norm_eps == SAT_FINAL_NORM_EPS:
        return ["diffusers has 1e-5 for the last norm's eps of 1e-6: about 5e-6 of the output's size"]
    return []


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise OutputPathError(f"{output} is where the model is read from; choose another folder")
    if output.exists() and not output.is_dir():
        raise OutputPathError(f"{output} is a file; name a folder")
    if output.exists() and not overwrite:
        raise OutputPathError(f"{output} already exists; choose another name or pass --overwrite")


def _check_space(output: Path, needed: int) -> None:
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputPathError(f"{output} needs {needed / GB:.1f} GB, {free / GB:.1f} GB are free there")


def _lines(result: dict[str, Any]) -> list[str]:
    parts = [
        f"{part}: {count['tensors']} tensors, {count['parameters']:,} parameters, "
        f"{count['bytes'] / GB:.2f} GB"
        for part, count in result["parts"].items()
    ]
    verb = "would write" if result["dry_run"] else "wrote"
    source, target = result["layouts"]
    return [*parts, *result["notes"], f"{verb} {result['path']} ({source} -> {target})"]
