"""Lists of captioned clips on disk, and the frames of a clip that are asked for.

| files | a clip is |
|---|---|
| `metadata.jsonl` | an object a line: "video" (or "file_name"), "caption" (or "text"), and anything else |
| `prompts.txt`, `videos.txt` | line N of both; blank lines are skipped (CogVideoX's finetuning data sets) |
| `videos/NAME.mp4`, `labels/NAME.txt` | a video and the first line of its label (CogVideoX's SAT data sets) |

Paths are relative to the list that names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from av.error import FFmpegError

from shared.errors import SettingError, UserError
from shared.json_files import parse_json
from shared.video import Video
from shared.video_io import FOLDER_META, opened, read_video

METADATA, PROMPTS, VIDEOS = "metadata.jsonl", "prompts.txt", "videos.txt"
VIDEO_FIELDS, CAPTION_FIELDS = ("video", "file_name"), ("caption", "text")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
READ_BYTES = 1 << 20
SLACK = 1.01  # a file of 7.94 frames per second is one of 8


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A line of a list: `name` is the path as written there, `video` the file, `fields` the rest of it."""

    number: int
    name: str
    video: Path
    caption: str
    fields: Mapping[str, Any] = field(default_factory=dict)


# ---- lists


def read_clips(path: str | Path, *, must_exist: bool = True) -> tuple[Clip, ...]:
    """The clips of a folder, or of one of its lists by name (metadata.jsonl, or videos.txt with prompts.txt
    beside it). SettingError says which line is wrong, or with `must_exist` which file is not there."""
    path = Path(path)
    clips = _read_list(path)
    if not clips:
        raise SettingError(f"{path} names no clips")
    absent = [clip for clip in clips if not clip.video.exists()] if must_exist else []
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise SettingError(
            f"{absent[0].video} does not exist{more}; cogvideo-data filter leaves such clips out"
        )
    return clips


def folder_of(path: str | Path) -> Path:
    """Where the lists of the data set `path` are."""
    path = Path(path)
    return path if path.is_dir() else path.parent


def _read_list(path: Path) -> tuple[Clip, ...]:
    if path.is_dir():
        if (path / METADATA).is_file():
            return _read_metadata(path / METADATA)
        if (path / VIDEOS).is_file():
            return _read_lines(path)
        if (path / "labels").is_dir():
            return _read_labels(path)
    elif path.suffix == ".jsonl" and path.is_file():
        return _read_metadata(path)
    elif path.name in (VIDEOS, PROMPTS) and path.is_file():
        return _read_lines(path.parent)
    legal = f"{METADATA}, {PROMPTS} with {VIDEOS}, or videos/ with labels/"
    raise SettingError(f"{path} is no list of clips; legal: a folder with {legal}, or one of these lists")


def _read_metadata(path: Path) -> tuple[Clip, ...]:
    clips = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise SettingError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise SettingError(f"{where} must be an object, got {type(row).__name__}")
        name, caption = _field(row, VIDEO_FIELDS, where), _field(row, CAPTION_FIELDS, where)
        rest = {key: value for key, value in row.items() if key not in (*VIDEO_FIELDS, *CAPTION_FIELDS)}
        clips.append(_clip(len(clips), name, path.parent, caption, rest))
    return tuple(clips)


def _field(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    raise SettingError(f"{where} has no text {' or '.join(map(repr, names))}")


def _read_lines(folder: Path) -> tuple[Clip, ...]:
    captions, names = (_filled_lines(folder / name) for name in (PROMPTS, VIDEOS))
    if len(captions) != len(names):
        raise SettingError(f"{folder}: {PROMPTS} has {len(captions)} lines, {VIDEOS} {len(names)}")
    pairs = zip(names, captions, strict=True)
    return tuple(_clip(i, name, folder, caption) for i, (name, caption) in enumerate(pairs))


def _filled_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise SettingError(f"{path} is missing")
    return [line.strip() for line in _text(path).split("\n") if line.strip()]


def _read_labels(folder: Path) -> tuple[Clip, ...]:
    labels = sorted((folder / "labels").glob("*.txt"))
    clips = []
    for number, label in enumerate(labels):
        caption = _text(label).partition("\n")[0].strip()
        clips.append(_clip(number, f"videos/{label.stem}.mp4", folder, caption))
    return tuple(clips)


def _clip(number: int, name: str, folder: Path, caption: str, rest: Mapping[str, Any] | None = None) -> Clip:
    if "\0" in name:
        raise SettingError(f"clip {number} of {folder} is named {name[:80]!r}, as no file can be")
    return Clip(number=number, name=name, video=folder / name, caption=caption.strip(), fields=rest or {})


def _text(path: Path) -> str:
    """Its lines end in \\n alone: `splitlines` also cuts at characters that captions may have (U+2028)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read {path}: {error}") from error


# ---- content


def content_key(path: Path) -> str:
    """32 hex digits of what a video file, or a folder of frames, holds, whatever its name; UserError where it
    cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in _frame_files(path) if path.is_dir() else [path]:
            if path.is_dir():
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(READ_BYTES):
                    digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()[:32]


def _frame_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return [*files, *([folder / FOLDER_META] if (folder / FOLDER_META).is_file() else [])]


# ---- frames


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What a file says of itself; reading it may find fewer frames."""

    num_frames: int
    fps: float
    height: int  # pixels, upright
    width: int


def probe(path: Path) -> Extent:
    """Size, number and rate of a clip's frames, of which it decodes the first. UserError for what is no video
    (a file of sound alone, one without frames)."""
    timed = path.suffix.lower() == ".gif"  # its rate shows in the times of all its frames
    first = read_video(path, max_frames=None if timed else 1)
    files = [file for file in _frame_files(path) if file.name != FOLDER_META] if path.is_dir() else []
    known = first.num_frames if timed else len(files)
    count, fps = (known, first.fps) if known else _declared(path)
    return Extent(num_frames=count, fps=fps, height=first.height, width=first.width)


def _declared(path: Path) -> tuple[int, float]:
    """Number of frames, by the container's table or its packets, and their rate."""
    try:
        with opened(path) as (container, stream):
            count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            rate = stream.average_rate or stream.guessed_rate or Fraction(0)
    except (FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {path}: {error.strerror or error}") from error
    if not count or not rate:
        raise UserError(f"{path} has no frames")
    return count, float(rate)


def read_frames(path: Path, indices: Sequence[int], fps: float) -> Video:
    """The frames `indices` (in rising order, repeats allowed) of a clip, shown at `fps`. Only what lies
    between the first and the last is held in memory. UserError where the file ends earlier."""
    first, span = indices[0], indices[-1] - indices[0] + 1
    found = read_video(path, start=first, max_frames=span)
    if found.num_frames < span:
        raise UserError(f"{path} ends after {first + found.num_frames} frames: it is cut off or damaged")
    return Video(frames=found.frames[torch.tensor(indices) - first], fps=fps)


def even_count(num_frames: int, fps: float, rate: float) -> int:
    """How many frames a clip has at `rate` per second, none of them twice; SettingError for a slower clip."""
    if fps * SLACK < rate:
        raise SettingError(f"the clip has {fps:g} frames per second, fewer than the {rate:g} asked for")
    return int((num_frames - 1) * min(rate / fps, 1.0) + 1e-6) + 1


def even_indices(fps: float, rate: float, count: int) -> tuple[int, ...]:
    """The frames of a clip nearest to the times 0, 1/rate, 2/rate, ..."""
    step = max(fps / rate, 1.0)
    return tuple(int(i * step + 0.5 - 1e-6) for i in range(count))
