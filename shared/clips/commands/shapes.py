"""The verb `shapes`: clips of the demo world with their captions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from shared.clips import shapes
from shared.errors import OutputPathError, SettingError
from shared.files import atomic_path
from shared.verbs import add_output_flags, say
from shared.video_io import write_video

Format = Literal["mp4", "mkv"]
OUR_FILES = {"metadata.jsonl", "prompts.txt", "videos.txt", "videos"}
BESIDE = {"scores.jsonl", "check.json"}  # what other verbs write beside the clips by default


@dataclass(frozen=True, kw_only=True)
class ShapesSettings:
    """Which clips of the demo world to write; `mkv` is lossless."""

    num_videos: int = 100
    num_frames: int = shapes.NUM_FRAMES
    split: shapes.Split = "train"
    seed: int = 0
    format: Format = "mp4"

    def __post_init__(self) -> None:
        if self.num_videos < 1:
            raise SettingError(f"num_videos must be at least 1, got {self.num_videos}")
        if not 1 <= self.num_frames <= shapes.NUM_FRAMES:
            raise SettingError(
                f"num_frames must be in 1..{shapes.NUM_FRAMES} (later the shape could leave the frame), "
                f"got {self.num_frames}"
            )
        if self.seed < 0:
            raise SettingError(f"seed must not be negative, got {self.seed}")


def write_shapes(
    settings: ShapesSettings, folder: Path, *, overwrite: bool = False, quiet: bool = False
) -> None:
    """Write `folder`: `videos/000000.mp4` and so on, `metadata.jsonl` with one object per clip ("video" is
    relative to the folder), and the same as `prompts.txt` and `videos.txt`, line by line.

    The folder is complete or absent. Raises OutputPathError where it exists (without `overwrite`), holds
    anything else, or cannot be written.
    """
    _keep_foreign_folders(folder)
    with atomic_path(folder, overwrite=overwrite) as temporary:
        temporary.mkdir()
        drawn = islice(shapes.scenes(settings.split, settings.seed), settings.num_videos)
        bar = tqdm(drawn, total=settings.num_videos, disable=quiet, unit="clip")
        rows = [_write_clip(settings, scene, i, temporary) for i, scene in enumerate(bar)]
        _write_lines(temporary / "metadata.jsonl", (json.dumps(row) for row in rows))
        _write_lines(temporary / "prompts.txt", (row["caption"] for row in rows))
        _write_lines(temporary / "videos.txt", (row["video"] for row in rows))


def _write_clip(settings: ShapesSettings, scene: shapes.Scene, index: int, folder: Path) -> dict[str, Any]:
    name = f"videos/{index:06d}.{settings.format}"
    video = shapes.render(scene, num_frames=settings.num_frames)
    write_video(video, folder / name)
    about = {"num_frames": video.num_frames, "height": video.height, "width": video.width, "fps": video.fps}
    return {"video": name, "caption": scene.caption.text} | scene.caption.attributes() | about


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _keep_foreign_folders(folder: Path) -> None:
    """Overwriting removes the folder, so it must be empty or one of ours."""
    if folder.is_file():
        raise OutputPathError(f"{folder} is a file; the clips need a folder")
    if folder.is_dir() and (foreign := {path.name for path in folder.iterdir()} - OUR_FILES - BESIDE):
        raise OutputPathError(f"{folder} holds other files ({min(foreign)}); choose another folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    usual = ShapesSettings()
    parser.add_argument("--output_path", type=Path, required=True, help="the folder to write")
    parser.add_argument("--num_videos", type=int, default=usual.num_videos, help="default: %(default)s")
    parser.add_argument(
        "--split", choices=get_args(shapes.Split), default=usual.split, help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=usual.seed, help="default: %(default)s")
    parser.add_argument(
        "--num_frames",
        type=int,
        default=usual.num_frames,
        help="1 to %(default)s; fewer show the beginning of the motion",
    )
    parser.add_argument(
        "--format", choices=get_args(Format), default=usual.format, help="mkv is lossless; default: mp4"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that an earlier call wrote"
    )
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    settings = ShapesSettings(
        num_videos=options.num_videos,
        num_frames=options.num_frames,
        split=options.split,
        seed=options.seed,
        format=options.format,
    )
    write_shapes(settings, options.output_path, overwrite=options.overwrite, quiet=options.quiet)
    said = {"ok": True, "output_path": str(options.output_path), "num_videos": settings.num_videos}
    say(options, said, [f"{settings.num_videos} clips in {options.output_path}"])
