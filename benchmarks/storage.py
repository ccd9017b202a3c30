"""Where a run keeps what: frames without loss, a film for eyes, and a sidecar that says how each was made.

RUN/run.json, RUN/videos/MODEL/ID.{mkv,mp4,json}, RUN/clips/N.{mkv,json} (ground truth),
RUN/reconstructions/MODEL/N.{mkv,json}, RUN/diagnostics/MODEL/N.json (what the model says of clip N),
RUN/failures/*.json (why an item is not there), RUN/imported/*.json (scores that others measured).
The sidecar is written last: an item is finished when it is there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.metrics.base import digest
from shared.errors import SettingError, UserError
from shared.files import LEFTOVER, write_json
from shared.json_files import read_object
from shared.video import Video
from shared.video_io import read_video, write_video

TIMED_METRICS = ("seconds_per_video", "joules_per_video")
TIMED_KEYS = ("state",)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @property
    def index(self) -> Path:
        return self.path / "run.json"

    @property
    def clips(self) -> Path:
        return self.path / "clips"

    def videos(self, model: str) -> Path:
        return self.path / "videos" / folder_name(model)

    def reconstructions(self, model: str) -> Path:
        return self.path / "reconstructions" / folder_name(model)

    def diagnostics(self, model: str) -> Path:
        return self.path / "diagnostics" / folder_name(model)

    @property
    def failures(self) -> Path:
        return self.path / "failures"

    @property
    def imported(self) -> Path:
        return self.path / "imported"

    def read_index(self) -> dict[str, Any]:
        """The run's run.json; SettingError where this is no run."""
        if not self.index.is_file():
            raise SettingError(f"{self.path} is not a run: it has no run.json (make one with `run SUITE`)")
        said = read_json(self.index)
        if not all(isinstance(said.get(name), dict) for name in ("suite", "models")):
            raise SettingError(f"{self.index} is not the index of a run: it needs a suite and models")
        return said


def folder_name(model: str) -> str:
    """A model's name as one path component."""
    return re.sub(r"[^\w.+-]+", "_", model)


def read_json(path: Path) -> dict[str, Any]:
    return read_object(path, SettingError)


def save_item(folder: Path, name: str, video: Video, sidecar: dict[str, Any], *, film: bool = True) -> None:
    """Frames, film, then the sidecar with the frames' shape and checksum."""
    frames = write_video(video, folder / f"{name}.mkv", overwrite=True)
    if film:
        write_video(video, folder / f"{name}.mp4", overwrite=True, odd="pad")
    described = {
        "video": describe(video),
        "frames_sha256": frames_digest(video),
        "file_bytes": frames.stat().st_size,
    }
    write_json(folder / f"{name}.json", {**sidecar, **described})


def load_frames(folder: Path, sidecar: dict[str, Any]) -> Video:
    """The lossless frames of an item. SettingError when they are not those that were written."""
    path = folder / f"{sidecar['id']}.mkv"
    video = read_video(path)
    if frames_digest(video) != sidecar["frames_sha256"]:
        raise SettingError(
            f"{path} does not hold the frames that its sidecar describes; delete it, run again"
        )
    return Video(frames=video.frames, fps=sidecar["video"]["fps"])


def describe(video: Video) -> dict[str, float]:
    return {"frames": video.num_frames, "fps": video.fps, "height": video.height, "width": video.width}


def frames_digest(video: Video) -> str:
    return hashlib.sha256(video.frames.contiguous().numpy().tobytes()).hexdigest()


def sidecars(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Sidecars of the finished items among `names`, in that order."""
    return [read_json(folder / f"{name}.json") for name in names if (folder / f"{name}.json").is_file()]


def finished(folder: Path, name: str, settings_hash: str) -> bool:
    """Is the item there, made with these settings, its frames of the size that was written?"""
    path, frames = folder / f"{name}.json", folder / f"{name}.mkv"
    if not (path.is_file() and frames.is_file()):
        return False
    with suppress(SettingError):
        said = read_json(path)
        size = said.get("file_bytes", frames.stat().st_size)  # absent in sidecars of older versions
        return said.get("settings_hash") == settings_hash and size == frames.stat().st_size
    return False


def readable(folder: Path, sidecar: Mapping[str, Any]) -> Video | None:
    """The lossless frames of an item; None where they are damaged."""
    try:
        return load_frames(folder, {**sidecar})
    except (UserError, KeyError):
        return None


def intact(folder: Path, name: str) -> bool:
    """Can the item's frames be read, and are they those of the sidecar?"""
    path = folder / f"{name}.json"
    try:
        return path.is_file() and readable(folder, read_json(path)) is not None
    except SettingError:
        return False


def remove_leftovers(folder: RunFolder) -> None:
    """Half-written files of processes that were killed. Only for when nobody is at work in the folder."""
    for path in folder.path.rglob(".*.tmp*"):
        if LEFTOVER.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def state(folder: RunFolder) -> str:
    """A digest of all that a run's numbers are taken from; it changes when anything is made again."""
    lasting = ("settings_hash", "frames_sha256", "values", "refused", "reason", "seconds", "scores")
    found = {}
    for kind in ("clips", "videos", "reconstructions", "diagnostics", "failures", "imported"):
        for path in sorted((folder.path / kind).rglob("*.json")):
            said = read_json(path)
            found[str(path.relative_to(folder.path))] = {name: said.get(name) for name in lasting}
    return digest(found)


def read_imported(folder: RunFolder) -> dict[str, Any]:
    """Scores that others measured on this run's videos, by the name of their file."""
    return {path.stem: read_json(path) for path in sorted(folder.imported.glob("*.json"))}


def lasting(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json without what a clock or a memory meter said: equal, byte for byte as JSON, for two runs of
    the same suite on machines that compute alike, however often either was interrupted."""
    kept = {name: value for name, value in results.items() if name not in TIMED_KEYS}
    models = {
        name: {
            **{key: value for key, value in row.items() if key not in ("stages", "cost")},
            "metrics": {key: value for key, value in row["metrics"].items() if key not in TIMED_METRICS},
        }
        for name, row in results["models"].items()
    }
    differences = [entry for entry in results["differences"] if entry["metric"] not in TIMED_METRICS]
    return {**kept, "models": models, "differences": differences}
