"""Videos that were made elsewhere, behind the protocol of a model: a folder, and what each file shows.

The prompts are in a file, or are the files' names. In the file, one line for each video: `.csv` with the
columns `file` and `prompt`; `.json` or `.jsonl` with the same keys, or one object {file: prompt}; `.txt` with
one prompt for each file, in the order of their names. Without it, a video's prompt is its name without `-0`,
`-1`, ... (VBench's way of counting samples), or what its own sidecar says under "prompt".
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from benchmarks.suites import Suite
from benchmarks.windows import Window
from shared.errors import SettingError, UserError
from shared.json_files import parse_json, read_object
from shared.protocol import GenerationRequest, GenerationResult
from shared.video import Video
from shared.video_io import opened, read_video

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
COUNTLESS = {"matroska", "webm"}  # formats that tell their duration, but not how many frames they have
PROMPT_FILES = ("prompts.csv", "prompts.jsonl", "prompts.json", "prompts.txt")


@dataclass(frozen=True, kw_only=True)
class Made:
    """One video and what it should show."""

    path: Path
    prompt: str


class ImportedVideos:
    """The videos of a folder, as if a model made them: sample N of a prompt is its N-th file."""

    tasks = frozenset({"t2v"})

    def __init__(self, name: str, made: Iterable[Made]) -> None:
        self.name = name
        self.made: dict[str, list[Path]] = {}
        for one in made:
            self.made.setdefault(one.prompt, []).append(one.path)

    @classmethod
    def open(cls, folder: Path, prompt_file: Path | None = None) -> ImportedVideos:
        return cls(f"external:{folder}", read_folder(folder, prompt_file))

    def settings(self) -> dict[str, Any]:
        """What the frames depend on: the files' content."""
        files = {prompt: [_digest(path) for path in paths] for prompt, paths in self.made.items()}
        return {"family": "external", "container": self._containers(), "files": files}

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """UserError for a prompt without a video and for a file that is damaged or cut short."""
        paths = self.made.get(request.prompt, [])
        if request.sample >= len(paths):
            raise UserError(f"no video {request.sample} of the prompt {request.prompt!r} in {self.name}")
        return GenerationResult(video=read_whole(paths[request.sample]))

    def suite(self, name: str, models: tuple[str, ...] = (), window: Window | None = None) -> Suite:
        """A suite of these prompts: this folder, and other models to compare it with."""
        prompts = tuple(self.made)
        each = min(len(paths) for paths in self.made.values())
        left = sum(map(len, self.made.values())) - each * len(prompts)
        return Suite(
            name=name,
            models=(self.name, *models),
            description="Videos made elsewhere."
            + (f" {left} are left out: every prompt has {each}." if left else ""),
            prompts=prompts,
            num_prompts=len(prompts),
            num_videos_per_prompt=each,
            num_clips=0,
            window=window,
        )

    def _containers(self) -> list[str]:
        """The files' formats: a number of frames out of a lossy file is not one of frames as made."""
        return sorted({path.suffix.lower() or "frames" for paths in self.made.values() for path in paths})


def read_whole(path: Path) -> Video:
    """All frames of a video; UserError where the file announces more than can be read."""
    video = read_video(path)
    announced, slack = _announced(path) if path.is_file() else (0, 0)
    if video.num_frames < announced - slack:
        raise UserError(f"{path} is cut short: {video.num_frames} of {announced} frames can be read")
    return video


def _announced(path: Path) -> tuple[int, int]:
    """How many frames the file's head promises, 0 where it does not say, and how far that may be off."""
    try:
        with opened(path) as (container, stream):
            if stream.frames or not COUNTLESS & {*container.format.name.split(",")}:
                return stream.frames, 0
            if len(container.streams) > 1 or not container.duration or not stream.average_rate:
                return 0, 0  # the duration may be that of the sound
            # some writers leave the last frame's duration out
            return round(stream.average_rate * container.duration / av.time_base), 1
    except (FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {path}: {error}") from error


def read_folder(folder: Path, prompt_file: Path | None = None) -> list[Made]:
    """The videos of a folder in the order of their names. SettingError where there are none, or where prompts
    and files do not belong to each other."""
    if not folder.is_dir():
        raise SettingError(f"there is no folder {folder}")
    files = [path for path in sorted(folder.iterdir(), key=_by_number) if _is_video(path)]
    if not files:
        raise SettingError(f"{folder} has no videos (legal: {', '.join(SUFFIXES)}, folders of png frames)")
    beside = [folder / name for name in PROMPT_FILES if (folder / name).is_file()]
    source = prompt_file or (beside[0] if beside else None)
    if source is None:
        return [Made(path=path, prompt=_own_prompt(path)) for path in files]
    said = _read_prompts(source, files)
    known = {path.name: path for path in files} | {path.stem: path for path in files}
    if missing := [name for name in said if name not in known]:
        raise SettingError(f"{source} names {missing[0]!r}, which is not in {folder} ({len(missing)} such)")
    return [Made(path=known[name], prompt=prompt) for name, prompt in said.items()]


def _read_prompts(source: Path, files: list[Path]) -> dict[str, str]:
    """File name -> prompt."""
    try:
        text = source.read_text(encoding="utf-8-sig")
        match source.suffix.lower():
            case ".csv":
                rows: list[dict[str, str]] = list(csv.DictReader(io.StringIO(text)))
            case ".jsonl":
                rows = [parse_json(line) for line in text.split("\n") if line.strip()]
            case ".json":
                plain = parse_json(text)
                rows = (
                    plain if isinstance(plain, list) else [{"file": f, "prompt": p} for f, p in plain.items()]
                )
            case ".txt":
                lines = [line.strip() for line in text.split("\n") if line.strip()]
                if len(lines) != len(files):
                    raise SettingError(f"{source} has {len(lines)} prompts for {len(files)} videos")
                rows = [{"file": f.name, "prompt": line} for f, line in zip(files, lines, strict=True)]
            case other:
                raise SettingError(f"prompts are read from .csv, .json, .jsonl or .txt, got {other!r}")
        return {Path(row.get("file") or row["video"]).name: row["prompt"].strip() for row in rows}
    except SettingError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise SettingError(f"cannot read prompts from {source}: {error}") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise SettingError(f"{source}: every row needs file and prompt; {error!r}") from error


def _own_prompt(path: Path) -> str:
    """From the sidecar beside the video, else its name without the sample's number."""
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        try:
            return str(read_object(sidecar, SettingError)["prompt"]).strip()
        except KeyError as error:
            raise SettingError(f"{sidecar} does not tell the prompt: {error!r}") from error
    return re.sub(r"-\d+$", "", path.stem).strip()


def _is_video(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.png"))
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _by_number(path: Path) -> list[Any]:
    """Names with their numbers as numbers: sample 2 comes before sample 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16]
