"""The verb `encode`: the latents of a video, with the VAE alone in memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import OutputPathError, SettingError
from shared.generation_cli import IMAGE_SUFFIXES, check_writable
from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from shared.video import Video


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input_path", type=Path, required=True, help="a video, a folder of frames, an image"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="the .safetensors file to write")
    add_codec_flags(parser)
    parser.add_argument("--num_frames", type=int, help="the first so many (default: all)")
    parser.add_argument("--height", type=int, help="in pixels; covered and cut (default: the video's)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--fit_frames", choices=("nearest", "pad", "trim"),
                        help="make another number of frames legal; pad repeats the last one")  # fmt: skip
    parser.add_argument("--posterior", choices=("mode", "sample"), default="mode",
                        help="what to take of the encoder's distribution (default: mode)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")


def add_codec_flags(parser: argparse.ArgumentParser) -> None:
    """What `encode` and `decode` share."""
    parser.add_argument("--model_path", default="demo", help="demo (the default) or a model folder")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the model's own)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:N, mps")
    parser.add_argument("--tiling", action="store_true", help="in blended tiles: less memory, other values")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Everything is checked before the weights are read."""
    from cogvideox_diff.codec import clip_size, encode_video, fitted, load_vae
    from cogvideox_diff.formats import open_folder
    from cogvideox_diff.latent_files import LatentFile, write_latents
    from cogvideox_diff.planning import check_dtype
    from shared.model_folder import weights_mark
    from shared.runtime import parse_device, parse_dtype, spare_threads

    folder = open_folder(options.model_path)
    check_output(options.output_path, (".safetensors",), options.overwrite)
    dtype = folder.trained_dtype if options.dtype is None else parse_dtype(options.dtype)
    check_dtype(folder.trained_dtype, dtype)
    device, config = parse_device(options.device), folder.config.vae
    wanted = options.num_frames  # which --fit_frames may exceed, by less than a latent frame
    most = None if wanted is None else max(wanted, 0) + config.time_factor
    video = read_clip(options.input_path, folder.config.geometry.fps, most)
    size = clip_size(config, video, num_frames=options.num_frames, height=options.height,
                     width=options.width, fit=options.fit_frames)  # fmt: skip
    vae = load_vae(folder, dtype, device)
    spare_threads(vae)
    latents = encode_video(vae, fitted(video, size), draw=options.posterior, seed=options.seed,
                           tiled=options.tiling)  # fmt: skip
    content = LatentFile(
        latents=latents,
        kind="clean",
        scaling_factor=config.scaling_factor,
        fps=video.fps,
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        model=weights_mark(folder.path),
        settings={"posterior": options.posterior, "seed": options.seed, "tiling": options.tiling,
                  "dtype": str(dtype).removeprefix("torch.")},
    )  # fmt: skip
    path = write_latents(options.output_path, content, overwrite=options.overwrite)
    told = {"mean": float(latents.mean()), "std": float(latents.std())}
    result = {"ok": True, "exit_code": 0, "path": str(path), **content.described(), **told}
    shape = " x ".join(map(str, latents.shape))
    line = f"{path}: latents {shape} (frames, channels, rows, columns), mean {told['mean']:.3f}"
    say(options, result, [f"{line}, standard deviation {told['std']:.3f}"])


def read_clip(path: Path, fps: float, max_frames: int | None) -> Video:
    """The first frames of a video file or of a folder of frames, or an image as a video of one frame."""
    from shared.video import Video
    from shared.video_io import read_image, read_video

    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Video(frames=read_image(path)[None], fps=fps)
    return read_video(path, max_frames=max_frames)


def check_output(path: Path, suffixes: tuple[str, ...], overwrite: bool) -> None:
    """SettingError for another kind of file, OutputPathError where it cannot be written."""
    if path.suffix.lower() not in suffixes:
        raise SettingError(f"cannot write {path.name}; legal: a name that ends in {', '.join(suffixes)}")
    if path.exists() and not overwrite:
        raise OutputPathError(f"{path} already exists; choose another name or pass --overwrite")
    check_writable(path.parent)
