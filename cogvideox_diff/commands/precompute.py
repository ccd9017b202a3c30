"""The verb `precompute`: a list of clips as latents and text features, for training without the encoders."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from shared.verbs import add_output_flags


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input_path", type=Path, required=True,
                        help="a folder of clips, its metadata.jsonl, or its videos.txt")
    parser.add_argument("--output_path", type=Path, required=True, help="the folder to write or go on with")
    parser.add_argument("--model_path", default="demo", help="demo (the default) or a model folder")
    parser.add_argument("--sizes", nargs="+", metavar="FxHxW",
                        help="FRAMESxHEIGHTxWIDTH that clips are made to fit (default: the model's own)")
    parser.add_argument("--size_rule", choices=("aspect", "size"), default="aspect",
                        help="a clip takes the size of the nearest aspect (default), or the nearest size")
    parser.add_argument("--frames", choices=("even", "sat", "finetune"), default="even",
                        help="which frames: at even times (default), or as a released data set takes them")
    parser.add_argument("--fps", type=float, help="frames per second to take (default: the model's)")
    parser.add_argument("--tiling", action="store_true", help="encode in blended tiles: less memory")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:N, mps")
    parser.add_argument("--clips_per_shard", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode (default: 0)")
    add_output_flags(parser)
# fmt: on


def run(options: argparse.Namespace) -> int:
    """Exit code 7 where clips were left out. Everything is checked before the weights are read."""
    from cogvideox_diff.formats import open_folder
    from cogvideox_diff.planning import check_dtype
    from cogvideox_diff.training.precompute import (
        Preparation,
        check_buckets,
        load_encoders,
        precompute,
    )
    from shared.clips.buckets import Bucket, parse_buckets
    from shared.clips.dataset import read_clips
    from shared.clips.precompute import tell
    from shared.generation_cli import check_writable
    from shared.model_folder import weights_mark
    from shared.runtime import parse_device, parse_dtype

    folder = open_folder(options.model_path)
    native = folder.config.geometry
    own = Bucket(num_frames=native.num_frames, height=native.height, width=native.width)
    buckets = parse_buckets(options.sizes) if options.sizes else (own,)
    check_buckets(buckets, folder.config)
    fps = float(native.fps if options.fps is None else options.fps)
    preparation = Preparation(buckets=buckets, fps=fps, frames=options.frames, rule=options.size_rule)
    dtype = folder.trained_dtype if options.dtype is None else parse_dtype(options.dtype)
    check_dtype(folder.trained_dtype, dtype)
    device = parse_device(options.device)
    check_writable(options.output_path)
    clips = read_clips(options.input_path, must_exist=False)
    marks = {"encoder": weights_mark(folder.path), "dtype": str(dtype).removeprefix("torch.")}

    content = precompute(
        clips, preparation, partial(load_encoders, folder, dtype, device), marks, options.output_path,
        tiled=options.tiling, per_shard=options.clips_per_shard, num_workers=options.num_workers,
        quiet=options.quiet or options.json,
    )  # fmt: skip
    return tell(options, content, options.output_path)
