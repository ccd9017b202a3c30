"""The verb `decode`: the video of latents, with the VAE alone in memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from cogvideox_diff.commands.encode import add_codec_flags, check_output
from shared.errors import SettingError
from shared.verbs import say

VIDEO_SUFFIXES = (".mp4", ".mkv", ".gif")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input_path", type=Path, required=True, help="latents, as the verb encode writes them"
    )
    parser.add_argument(
        "--output_path", type=Path, required=True, help="the .mp4, .gif or .mkv file to write"
    )
    parser.add_argument("--fps", type=float, help="how fast to show the frames (default: as encoded)")
    add_codec_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Everything is checked before the weights are read."""
    from cogvideox_diff.codec import decode_video, load_vae
    from cogvideox_diff.formats import open_folder
    from cogvideox_diff.latent_files import check_latents, read_latents
    from cogvideox_diff.planning import check_dtype
    from shared.runtime import parse_device, parse_dtype, spare_threads
    from shared.video_io import write_video

    folder = open_folder(options.model_path)
    check_output(options.output_path, VIDEO_SUFFIXES, options.overwrite)
    if options.fps is not None and not options.fps > 0:
        raise SettingError(f"fps must be positive, got {options.fps}")
    dtype = folder.trained_dtype if options.dtype is None else parse_dtype(options.dtype)
    check_dtype(folder.trained_dtype, dtype)
    device = parse_device(options.device)
    content = read_latents(options.input_path)
    check_latents(content, folder.config, "clean")
    vae = load_vae(folder, dtype, device)
    spare_threads(vae)
    video = decode_video(vae, content.latents, options.fps or content.fps, tiled=options.tiling)
    path = write_video(video, options.output_path, overwrite=options.overwrite)
    sizes = {"frames": video.num_frames, "height": video.height, "width": video.width, "fps": video.fps}
    line = f"{path}: {video.num_frames} frames of {video.height}x{video.width} at {video.fps:g} per second"
    say(options, {"ok": True, "exit_code": 0, "path": str(path), **sizes}, [line])
