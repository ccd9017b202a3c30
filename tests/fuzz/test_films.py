"""Films that are damaged, cut off, empty, odd in size, rate, depth or transparency, or sound alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from benchmarks.imports import read_whole
from shared.clips.dataset import content_key, probe
from shared.clips.measures import measure
from shared.video_io import read_image, read_video
from tests.fuzz.harness import Tally, runs
from tests.fuzz.mutations import damaged
from tests.fuzz.world import World, programs
from tests.shared.clip_files import write_sound_only, write_without_frames

READERS = {
    "read_video": read_video,
    "probe": probe,
    "read_whole": read_whole,
    "measure": measure,
    "key": content_key,
}


@pytest.mark.parametrize("name", ["film.mkv", "film.mp4", "film.gif", "image.png"])
def test_damaged_bytes(name: str, world: World, tally: Tally, tmp_path: Path) -> None:
    data, rng, file = (world / name).read_bytes(), random.Random(name), tmp_path / name
    readers = {"read_image": read_image} if name == "image.png" else READERS
    for number in range(runs(12)):
        file.write_bytes(damaged(data, rng))
        reader = rng.choice(list(readers))
        tally.read(
            f"bytes of {name}", f"number {number}, {reader}", lambda reader=reader: readers[reader](file)
        )


def test_damaged_frames(world: World, tally: Tally, tmp_path: Path) -> None:
    """A folder of frames of which one is damaged."""
    rng = random.Random(0)
    for number in range(runs(6)):
        for file in (world / "frames").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        victim = tmp_path / rng.choice(sorted(file.name for file in tmp_path.iterdir()))
        victim.write_bytes(damaged(victim.read_bytes(), rng))
        tally.read("a folder of frames", f"number {number}, {victim.name}", lambda: read_video(tmp_path))


def write(
    path: Path,
    *,
    frames: int,
    size: tuple[int, int],
    codec: str,
    pixels: str,
    rate: int,
    times: list[int] | None,
) -> Path:
    """Frames of noise, at odd times where given."""
    rng = np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], pixels
        stream.time_base = Fraction(1, 1000)
        for i in range(frames):
            picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            frame = VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = (times[i] if times else i * 1000 // rate), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def odd_films(folder: Path) -> Iterator[Path]:
    plain = {"frames": 5, "size": (64, 64), "codec": "ffv1", "pixels": "bgr0", "rate": 8, "times": None}
    variants = {
        "one_frame.mkv": {"frames": 1},
        "odd_size.mkv": {"size": (33, 47)},
        "one_pixel.mkv": {"size": (1, 1)},
        "a_line.mkv": {"size": (1, 300)},
        "alpha.mkv": {"pixels": "bgra"},
        "alpha.mov": {"codec": "png", "pixels": "rgba"},
        "ten_bits.mkv": {"pixels": "yuv420p10le"},
        "ten_bits.mp4": {"codec": "libx264", "pixels": "yuv420p10le"},
        "sixteen_bits.mkv": {"pixels": "gray16le"},
        "grey.mkv": {"pixels": "gray"},
        "444.mp4": {"codec": "libx264", "pixels": "yuv444p"},
        "variable.mkv": {"times": [0, 3, 500, 501, 4000]},
        "variable.mp4": {"codec": "libx264", "pixels": "yuv420p", "times": [0, 40, 41, 1000, 9000]},
        "same_time.mkv": {"times": [0, 0, 0, 0, 0]},
        "slow.mkv": {"rate": 1, "times": [0, 10**6, 2 * 10**6, 3 * 10**6, 4 * 10**6]},
        "fast.mkv": {"rate": 1000},
        "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    }
    for name, changes in variants.items():
        try:
            yield write(folder / name, **{**plain, **changes})  # type: ignore[arg-type]
        except (av.error.FFmpegError, ValueError):  # this build of ffmpeg does not write it
            (folder / name).unlink(missing_ok=True)
    yield write_sound_only(folder / "sound.m4a")
    yield write_without_frames(folder / "no_frames.mkv")
    yield write_sound_only(folder / "sound.mp4")
    for name, content in {
        "empty.mp4": b"",
        "text.mkv": b"no video",
        "zeros.gif": b"\0" * 5000,
        "cut.png": b"\x89PNG\r\n",
    }.items():
        (folder / name).write_bytes(content)
        yield folder / name


def test_odd_films(world: World, tally: Tally, tmp_path: Path) -> None:
    films = list(odd_films(tmp_path))
    assert len(films) > 15
    for film in films:
        for name, reader in READERS.items():
            tally.read("odd films", f"{film.name}, {name}", lambda film=film, reader=reader: reader(film))
        for program, model in (("cogvideo-ar", "ar"), ("cogvideox", "diff")):
            argv = ["generate", "--model_path", str(world / model), "--prompt", "a", "--dry_run", "--quiet"]
            given = ["--image_or_video_path", str(film)]
            tally.command("odd films, generate", programs()[program], [*argv, *given], world.scratch)
    argv = ["import_videos", str(tmp_path), "--models", "nothing", "--output_path", "o", "--quiet"]
    tally.command("odd films, import", programs()["cogvideo-bench"], argv, world.scratch)
