"""The verb `clusters`: the table of token clusters that sampling draws from, stored beside the checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from cogvideo_ar.formats import ModelFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", required=True, help="demo, or a model folder")
    parser.add_argument("--from_file", type=Path, help="a table to take over, instead of k-means")
    parser.add_argument("--num_clusters", type=int, help="default: one for every 40 codes, as released")
    parser.add_argument("--seed", type=int, default=0, help="of k-means (default: 0)")
    parser.add_argument(
        "--output_path", type=Path, help="a .npy or .safetensors file (default: in the model's folder)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a table that is there")
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Write the table and say where and how large its clusters are."""
    from cogvideo_ar.clusters import make_clusters, read_clusters, write_clusters
    from cogvideo_ar.formats import open_folder

    folder = open_folder(options.model_path)
    path = _target(options, folder)
    size = folder.config.keyframes.num_image_tokens
    if options.from_file is not None:
        labels = read_clusters(options.from_file, size)
    else:
        labels = make_clusters(folder.codebook(), options.num_clusters, seed=options.seed)
    counts = labels.bincount()
    write_clusters(labels, path)
    found = {"clusters": len(counts), "smallest": int(counts.min()), "largest": int(counts.max())}
    words = f"{len(counts)} clusters of {found['smallest']} to {found['largest']} tokens: {path}"
    say(options, {"ok": True, "exit_code": 0, "path": str(path), **found}, [words])


def _target(options: argparse.Namespace, folder: ModelFolder) -> Path:
    from cogvideo_ar.parts import DEMO
    from shared.errors import OutputPathError, SettingError

    if options.from_file is not None and options.num_clusters is not None:
        raise SettingError("--num_clusters is of k-means, --from_file has its own clusters; name one of them")
    path = options.output_path
    if path is None and folder.path == DEMO:
        raise SettingError("the demo weights stay as they are; name a file with --output_path")
    path = folder.clusters_target if path is None else path
    if path.suffix not in (".npy", ".safetensors"):
        raise SettingError(f"{path} must end in .npy or .safetensors")
    if path.exists() and not options.overwrite:
        raise OutputPathError(f"{path} already exists; choose another name or pass --overwrite")
    return path
