"""Where a run keeps what: frames without loss, a film for eyes, and a sidecar that says how each was made.

RUN/run.json, RUN/videos/MODEL/ID.{mkv,mp4,json}, RUN/clips/N.{mkv,json} (ground truth),
RUN/reconstructions/MODEL/N.{mkv,json}, RUN/diagnostics/MODEL/N.json (what the model says of clip N).
The sidecar is written last: an item is finished when it is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import SettingError
from shared.files import write_json
from shared.video import Video
from shared.video_io import read_video, write_video


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

    def read_index(self) -> dict[str, Any]:
        """The run's run.json; SettingError where this is no run."""
        if not self.index.is_file():
            raise SettingError(f"{self.path} is not a run: it has no run.json (make one with `run SUITE`)")
        return read_json(self.index)


def folder_name(model: str) -> str:
    """A model's name as one path component."""
    return re.sub(r"[^\w.+-]+", "_", model)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SettingError(f"cannot read {path}: {error}") from error


def save_item(folder: Path, name: str, video: Video, sidecar: dict[str, Any], *, film: bool = True) -> None:
    """Frames, film, then the sidecar with the frames' shape and checksum."""
    write_video(video, folder / f"{name}.mkv", overwrite=True)
    if film:
        write_video(video, folder / f"{name}.mp4", overwrite=True, odd="pad")
    described = {"video": describe(video), "frames_sha256": frames_digest(video)}
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
    """Is the item there, made with these settings?"""
    path = folder / f"{name}.json"
    return (
        path.is_file()
        and (folder / f"{name}.mkv").is_file()
        and read_json(path).get("settings_hash") == settings_hash
    )
