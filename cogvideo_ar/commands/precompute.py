"""The verb `precompute`: a list of clips as image tokens and texts, for training without the codec."""

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
    parser.add_argument("--rates", type=float, nargs="+", metavar="FPS",
                        help="predefined frame rates (default: those of the model's frame-rate tokens)")
    parser.add_argument("--take", choices=("lowest", "all"), default="lowest",
                        help="of the rates that a clip is long enough for (default: lowest)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:N, mps")
    parser.add_argument("--clips_per_shard", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode (default: 0)")
    add_output_flags(parser)
# fmt: on


def run(options: argparse.Namespace) -> int:
    """Exit code 7 where clips were left out. Everything is checked before the weights are read."""
    from cogvideo_ar.formats import open_folder
    from cogvideo_ar.options import PIXELS_PER_TOKEN
    from cogvideo_ar.training.precompute import TokenReader, known_rates, load_encoders, precompute
    from shared.clips.dataset import read_clips
    from shared.clips.precompute import tell
    from shared.generation_cli import check_writable
    from shared.runtime import parse_device

    folder = open_folder(options.model_path)
    net = folder.config.keyframes
    height, width = (side * PIXELS_PER_TOKEN for side in net.grid)
    rates = tuple(sorted(set(options.rates))) if options.rates else known_rates(folder.config)
    reader = TokenReader(
        rates=rates, num_frames=net.num_frames, height=height, width=width, take=options.take
    )
    device = parse_device(options.device)
    check_writable(options.output_path)
    clips = read_clips(options.input_path, must_exist=False)
    content = precompute(
        clips, reader, partial(load_encoders, folder, device), {"encoder": folder.mark},
        options.output_path, per_shard=options.clips_per_shard, num_workers=options.num_workers,
        quiet=options.quiet or options.json,
    )  # fmt: skip
    return tell(options, content, options.output_path)
