"""Small lists of clips, good ones and broken ones. Not a test file."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame

from shared.clips import shapes
from shared.video import Video
from shared.video_io import write_video


def scenes(count: int, *, moving: bool = True) -> list[shapes.Scene]:
    """Different ones, of which none stands still unless that is allowed."""
    stream = (s for s in shapes.scenes("train", 4) if s.caption.speed or not moving)
    return list(islice(stream, count))


def write_clips(folder: Path, count: int, *, num_frames: int = 17, suffix: str = "mkv") -> list[str]:
    """Moving shapes as `videos/N.SUFFIX`; returns their captions."""
    drawn = scenes(count)
    for i, scene in enumerate(drawn):
        write_video(shapes.render(scene, num_frames=num_frames), folder / f"videos/{i}.{suffix}")
    return [scene.caption.text for scene in drawn]


def write_metadata(folder: Path, clips: Mapping[str, str]) -> Path:
    """A metadata.jsonl of video names and captions."""
    path = folder / "metadata.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"video": name, "caption": caption}) for name, caption in clips.items()]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def world(folder: Path, count: int, *, num_frames: int = 17, suffix: str = "mkv") -> Path:
    """A folder of good clips with its list."""
    said = write_clips(folder, count, num_frames=num_frames, suffix=suffix)
    write_metadata(folder, {f"videos/{i}.{suffix}": caption for i, caption in enumerate(said)})
    return folder


def noise_video(num_frames: int = 9, height: int = 64, width: int = 64, seed: int = 1) -> Video:
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randint(256, (num_frames, height // 8, width // 8, 3), generator=random).byte()
    return Video(frames=coarse.repeat_interleave(8, 1).repeat_interleave(8, 2), fps=8)


def write_cut_off(path: Path, source: Path) -> Path:
    """The first two thirds of a video file."""
    content = source.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def write_sound_only(path: Path) -> Path:
    """A file with an audio stream and no video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_without_frames(path: Path) -> Path:
    """A container that promises a video stream and holds no frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
        container.start_encoding()
    return path


def broken_files(folder: Path) -> list[str]:
    """One file of every kind that cannot be trained on, as `videos/NAME`."""
    whole = write_video(shapes.render(scenes(1)[0]), folder / "videos/whole.mp4")
    write_cut_off(folder / "videos/cut_off.mp4", whole)
    whole.unlink()
    write_sound_only(folder / "videos/sound.m4a")
    write_without_frames(folder / "videos/no_frames.mkv")
    (folder / "videos/empty.mp4").write_bytes(b"")
    (folder / "videos/text.mp4").write_text("this is not a video")
    return [
        f"videos/{name}" for name in ("cut_off.mp4", "sound.m4a", "no_frames.mkv", "empty.mp4", "text.mp4")
    ]


def killed_at(call: int, work: Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], object]) -> int:
    """Run `work` in a process of its own, which is killed (-9) at the given call of a function; `work` gets
    what makes a function count its calls. Returns the exit code."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return wrapper

    process = multiprocessing.get_context("fork").Process(target=work, args=(counted,))
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode
