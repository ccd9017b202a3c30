"""What can be told of a clip from its pixels alone, measured once and kept in a file beside the data.

A clip is decoded once, to thumbnails. Scores are keyed by the file's content, so a renamed clip keeps them
and a changed one is measured again; lines are appended as they are made, so an interrupted call goes on.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import av
import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from shared.clips.dataset import Clip, content_key
from shared.clips.workers import items_of
from shared.config_io import check_type
from shared.errors import OutputPathError, UserError
from shared.json_files import parse_json
from shared.video_io import opened, read_video

FORMAT = 1  # raised when a measure changes, so that older lines are measured again
SIDE = 32  # pixels of a thumbnail, whatever the clip's aspect
MOMENTS, SIGNATURE_SIDE = 5, 8  # frames and pixels of a signature
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
CUT_LEVELS, CUT_RATIO = 12.0, 5.0
LOST_SHARE = 0.1  # of a length that a container only estimates
Frames = NDArray[np.uint8]  # [T, SIDE, SIDE, 3]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one clip. `problem` says why there are none; the rest is 0 then.

    `motion`: mean speed of what moves, in frame heights per second (normal flow). `change`: the largest mean
    difference of a frame from the first, in grey levels of 255. `cuts`: first frames of new scenes.
    `signature`: five thumbnails, base64.
    """

    num_frames: int = 0
    fps: float = 0.0
    height: int = 0  # pixels, upright
    width: int = 0
    motion: float = 0.0
    change: float = 0.0
    cuts: tuple[int, ...] = ()
    signature: str = ""
    problem: str = ""

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps if self.fps else 0.0

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height if self.height else 0.0

    def scores(self) -> dict[str, Any]:
        """What a list of clips tells of each."""
        names = ("num_frames", "fps", "height", "width")
        plain = {name: getattr(self, name) for name in names}
        return plain | {"motion": round(self.motion, 4), "change": round(self.change, 2),
                        "cuts": len(self.cuts)}  # fmt: skip


# ---- measuring


def measure(path: Path) -> Measures:
    """Decode a clip and measure it; never raises for a bad file, see `Measures.problem`."""
    try:
        about, frames = _thumbnails(path)
    except UserError as error:
        return Measures(problem=str(error))
    return Measures(
        **about,
        motion=_motion(frames, about["fps"]),
        change=_change(frames),
        cuts=_cuts(frames),
        signature=_signature(frames),
    )


def _thumbnails(path: Path) -> tuple[dict[str, Any], Frames]:
    if path.is_dir():
        video = read_video(path)
        small = [_shrunk(frame.numpy()) for frame in video.frames]
        about = {"height": video.height, "width": video.width, "fps": video.fps, "num_frames": len(small)}
        return about, np.stack(small)
    try:
        with opened(path) as (container, stream):
            return _decoded(container, stream)
    except (FFmpegError, OSError) as error:
        raise UserError(f"it cannot be decoded: {error.strerror or error}") from error


def _decoded(container: Any, stream: Any) -> tuple[dict[str, Any], Frames]:
    small: list[NDArray[np.uint8]] = []
    size, turned = (0, 0), 0
    try:
        for frame in container.decode(stream):
            size, turned = (frame.height, frame.width), round(frame.rotation / 90) % 4
            small.append(np.rot90(_thumbnail(frame), turned))
    except FFmpegError as error:
        raise UserError(f"it is damaged after frame {len(small)}: {error.strerror or error}") from error
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not small or not rate:
        raise UserError("it has no frames")
    _check_whole(len(small), container, stream, rate)
    height, width = size[::-1] if turned % 2 else size
    return {"num_frames": len(small), "fps": rate, "height": height, "width": width}, np.stack(small)


def _thumbnail(frame: Any) -> NDArray[np.uint8]:
    """Shrunk first, then brought to RGB: the library's direct way loses two levels of brightness."""
    kind = "rgb24" if frame.format.is_rgb else "yuv444p"
    tiny = frame.reformat(width=SIDE, height=SIDE, format=kind, interpolation="AREA", threads=1)
    return tiny.to_ndarray(format="rgb24")


def _check_whole(found: int, container: Any, stream: Any, rate: float) -> None:
    """UserError where fewer frames came out than the container promises."""
    if stream.frames:
        promised, allowed = stream.frames, 0
    else:
        promised = round((container.duration or 0) / av.time_base * rate)
        allowed = max(2, round(LOST_SHARE * promised))
    if found < promised - allowed:
        raise UserError(f"it is cut off: {found} of {promised} frames can be decoded")


def _shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX))


def _motion(frames: Frames, fps: float) -> float:
    """sum |dI/dt| |grad I| over sum |grad I|^2, the speed along the gradient; 0 where nothing has edges."""
    if len(frames) < 2:
        return 0.0
    luma = frames.astype(np.float32) @ np.array(LUMA, np.float32)
    down, across = np.gradient(luma, axis=(1, 2))
    steep = np.hypot(down, across)[:-1]
    energy = float((steep**2).sum())
    speed = float((np.abs(np.diff(luma, axis=0)) * steep).sum()) / energy if energy else 0.0
    return speed * fps / SIDE


def _change(frames: Frames) -> float:
    apart = np.abs(frames.astype(np.int16) - frames[0].astype(np.int16))
    return float(apart.mean(axis=(1, 2, 3)).max())


def _cuts(frames: Frames) -> tuple[int, ...]:
    """Where a frame differs from the one before by `CUT_LEVELS` and by `CUT_RATIO` times what is usual in the
    clip, so that quick motion and flicker are none."""
    if len(frames) < 2:
        return ()
    steps = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    high = max(CUT_LEVELS, CUT_RATIO * float(np.median(steps)))
    return tuple(int(i) + 1 for i in np.flatnonzero(steps >= high))


def _signature(frames: Frames) -> str:
    picks = np.linspace(0, len(frames) - 1, MOMENTS).round().astype(int)
    block = SIDE // SIGNATURE_SIDE
    shape = (MOMENTS, SIGNATURE_SIDE, block, SIGNATURE_SIDE, block, 3)
    means = frames[picks].reshape(shape).mean(axis=(2, 4))
    return base64.b64encode(means.round().astype(np.uint8).tobytes()).decode()


def signature_values(signature: str) -> NDArray[np.int16]:
    """The grey levels of a signature, flat."""
    return np.frombuffer(base64.b64decode(signature), np.uint8).astype(np.int16)


# ---- the file of scores


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A clip, the key of its content ("" where the file cannot be read) and its measures."""

    clip: Clip
    key: str
    measures: Measures


def measure_all(
    clips: Sequence[Clip], scores: Path, *, num_workers: int = 0, quiet: bool = False
) -> list[Measured]:
    """Measures of all clips in order, those of `scores` taken over, new ones appended to it. OutputPathError
    where it cannot be written."""
    known = read_scores(scores)
    work = _Work(clips, frozenset(known))
    loader = DataLoader(work, batch_size=None, num_workers=num_workers, collate_fn=list)  # keeps the order
    found = []
    ahead = tqdm(items_of(loader), total=len(clips), desc="clips", disable=quiet or None)
    for clip, (key, fresh) in zip(clips, ahead, strict=True):
        measures = known.get(key) or fresh or measure(clip.video)
        if key and key not in known:
            known[key] = measures
            _append(scores, key, measures)
        found.append(Measured(clip=clip, key=key, measures=measures))
    return found


class _Work(Dataset):
    """Hashing and decoding, which several processes can share."""

    def __init__(self, clips: Sequence[Clip], known: frozenset[str]) -> None:
        self.clips, self.known = clips, known

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, place: int) -> tuple[str, Measures | None]:
        path = self.clips[place].video
        if not path.exists():
            return "", Measures(problem="there is no such file")
        try:
            key = content_key(path)
        except UserError as error:
            return "", Measures(problem=str(error))
        return key, None if key in self.known else measure(path)


def read_scores(path: Path) -> dict[str, Measures]:
    """By content; lines of another format, or cut off by a crash, do not count."""
    known: dict[str, Measures] = {}
    for row in _rows(path):
        if row.pop("format", None) == FORMAT:
            with suppress(KeyError, TypeError, ValueError):
                key, cuts = str(row.pop("key")), tuple(row.pop("cuts"))
                for name, hint in get_type_hints(Measures).items():
                    check_type(hint, row.get(name, cuts if name == "cuts" else None), name)
                if row["signature"]:
                    signature_values(row["signature"])
                known[key] = Measures(cuts=cuts, **row)
    return known


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _append(path: Path, key: str, measures: Measures) -> None:
    """One write per line, behind a line break: a torn line before it spoils nothing."""
    line = json.dumps({"format": FORMAT, "key": key, **asdict(measures)}, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            torn = file.tell() and not _ends_in_break(path)
            file.write((("\n" if torn else "") + line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputPathError(f"cannot write {path}: {error.strerror or error} (--scores)") from error


def _ends_in_break(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
