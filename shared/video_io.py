"""Videos to files and back.

| path | content | frames come back |
|---|---|---|
| `.mp4` | H.264 yuv420p, BT.709, index in front (faststart) | close |
| `.mkv` | FFV1 | exactly |
| `.gif` | one palette of 256 colours per frame, delays in hundredths of a second | close |
| no suffix | a folder of png frames with `video.json` | exactly |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import av
import imageio.v3 as iio
import numpy as np
import torch
from av.error import FFmpegError
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from shared.errors import OutputPathError, SettingError, UserError
from shared.files import atomic_path, write_json
from shared.json_files import read_json
from shared.video import Video

Odd = Literal["error", "pad"]
Pixels = NDArray[np.uint8]  # [H, W, 3]
SUFFIXES = (".mp4", ".mkv", ".gif", "")
FRAME_NAME, FOLDER_META = "frame_{:06d}.png", "video.json"
GIF_TICKS = 100  # per second
THREADS_PAY_FROM = 256 * 256  # pixels; decoding smaller frames, starting threads costs more than it saves
GIF_MAX_FPS = 50  # viewers slow down frames shorter than two ticks
BT709, LIMITED_RANGE = 1, 1  # code points of the video standards
QUALITIES = range(11)


# ---- writing


def write_video(
    video: Video, path: str | Path, *, overwrite: bool = False, odd: Odd = "error", quality: int = 8
) -> Path:
    """Write `video` to `path`, whose suffix chooses the format; the file is complete or absent.

    `quality` 0..10 is for mp4 (10 nearly lossless). mp4 needs even sizes: `odd="pad"` repeats the last row or
    column, else an odd size is an error. Raises SettingError, or OutputPathError for a path that exists
    (without `overwrite`) or cannot be written.
    """
    path = Path(path)
    writer = _writer(path.suffix.lower(), odd, quality)
    _keep_foreign_folders(path)
    with atomic_path(path, overwrite=overwrite) as temporary:
        try:
            writer(video, temporary)
        except FFmpegError as error:
            raise OutputPathError(f"cannot write {path}: {error.strerror}") from error
    return path


def _writer(suffix: str, odd: Odd, quality: int) -> Callable[[Video, Path], None]:
    if odd not in ("error", "pad"):
        raise SettingError(f"odd must be 'error' or 'pad', got {odd!r}")
    if quality not in QUALITIES:
        raise SettingError(f"quality must be a whole number 0..10, got {quality!r}")
    match suffix:
        case ".mp4":
            return lambda video, path: _write_mp4(_even(video, odd), path, quality)
        case ".mkv":
            return _write_mkv
        case ".gif":
            return _write_gif
        case "":
            return _write_folder
    raise SettingError(
        f"unknown video format {suffix!r}; legal: .mp4, .mkv, .gif, or no suffix for png frames"
    )


def _even(video: Video, odd: Odd) -> Video:
    height, width = video.height, video.width
    if height % 2 == 0 and width % 2 == 0:
        return video
    if odd == "error":
        below, above = (f"{height + sign * (height % 2)}x{width + sign * (width % 2)}" for sign in (-1, 1))
        nearest = above if min(height, width) < 2 else f"{below} or {above}"
        got = f"mp4 needs an even height and width, got {height}x{width}"
        raise SettingError(f"{got}; nearest: {nearest}; odd='pad' repeats the last row or column")
    rows, columns = (torch.arange(n + n % 2).clamp(max=n - 1) for n in (height, width))
    return Video(frames=video.frames[:, rows][:, :, columns], fps=video.fps)


def _write_mp4(video: Video, path: Path, quality: int) -> None:
    crf = max(1, round((10 - quality) * 4.5))  # 0 would be lossless, in a profile that few players know
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=_rate(video), options={"crf": str(crf)})
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        _encode(container, stream, video, "yuv420p")


def _write_mkv(video: Video, path: Path) -> None:
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:  # equal frames, equal bytes
        _encode(container, container.add_stream("ffv1", rate=_rate(video)), video, "bgr0")


def _encode(container: Any, stream: Any, video: Video, pixel_format: str) -> None:
    stream.width, stream.height, stream.pix_fmt = video.width, video.height, pixel_format
    for i, pixels in enumerate(_arrays(video)):
        frame = VideoFrame.from_ndarray(pixels, format="rgb24")
        colours = "ITU709" if pixel_format.startswith("yuv") else None
        frame = frame.reformat(format=pixel_format, dst_colorspace=colours, threads=1)
        frame.pts, frame.time_base = i, 1 / _rate(video)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _write_gif(video: Video, path: Path) -> None:
    """Every frame starts at its time rounded to a tick: delays alternate where the mean rate needs it."""
    if video.fps > GIF_MAX_FPS:
        raise SettingError(
            f"gif holds at most {GIF_MAX_FPS} frames per second, got {video.fps:g}; use mp4 or mkv"
        )
    ticks = [round(i * GIF_TICKS / _rate(video)) for i in range(video.num_frames + 1)]
    with av.open(path, "w", options={"final_delay": str(ticks[-1] - ticks[-2])}) as container:
        stream = cast(VideoStream, container.add_stream("gif", rate=GIF_TICKS))
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "pal8"
        for tick, frame in zip(ticks, _with_palettes(video), strict=False):
            frame.pts, frame.time_base = tick, Fraction(1, GIF_TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _with_palettes(video: Video) -> Iterator[VideoFrame]:
    """Frames in the 256 colours that suit each best."""
    graph = Graph()
    source = graph.add_buffer(
        width=video.width, height=video.height, format=VideoFormat("rgb24"), time_base=Fraction(1, GIF_TICKS)
    )
    split, sink = graph.add("split"), graph.add("buffersink")
    generate = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(generate, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for i, pixels in enumerate(_arrays(video)):
        frame = VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = i, Fraction(1, GIF_TICKS)
        source.push(frame)
        yield from _pulled(sink)
    source.push(None)
    yield from _pulled(sink)


def _pulled(sink: Any) -> Iterator[VideoFrame]:
    while True:
        try:
            yield sink.pull()
        except (BlockingIOError, EOFError):  # wants another frame, or had its last
            return


def _write_folder(video: Video, folder: Path) -> None:
    folder.mkdir()
    for i, pixels in enumerate(_arrays(video)):
        iio.imwrite(folder / FRAME_NAME.format(i), pixels, plugin="pillow")
    meta = {"fps": video.fps, "frames": video.num_frames, "height": video.height, "width": video.width}
    write_json(folder / FOLDER_META, meta)


def _keep_foreign_folders(path: Path) -> None:
    """Overwriting a folder removes it, so it must be one of ours."""
    if path.is_dir() and any(file.suffix != ".png" and file.name != FOLDER_META for file in path.iterdir()):
        raise OutputPathError(f"{path} is a folder with files that are not frames; choose another name")


def _arrays(video: Video) -> Iterator[Pixels]:
    for frame in video.frames:
        yield np.ascontiguousarray(frame.cpu().numpy())


def _rate(video: Video) -> Fraction:
    return Fraction(video.fps).limit_denominator(1001)


# ---- reading


def read_video(
    path: str | Path, *, fps: float | None = None, start: int = 0, max_frames: int | None = None
) -> Video:
    """Frames `start` to `start + max_frames` of a video file, or of a folder of images, as 8-bit RGB.

    Rotation flags are applied, alpha is laid over black, deeper colour is brought to 8 bits. `fps` replaces
    the file's own rate; a folder without `video.json` needs it. UserError names a file that cannot be read.
    """
    path = Path(path)
    if start < 0 or (max_frames is not None and max_frames < 1):
        raise SettingError(f"start must be >= 0 and max_frames >= 1, got {start} and {max_frames}")
    stop = None if max_frames is None else start + max_frames
    frames, rate = _read_folder(path, start, stop) if path.is_dir() else _read_file(path, start, stop)
    if not frames:
        raise UserError(f"{path} has no frames" + (f" from {start} on" if start else ""))
    if fps is None and rate is None:
        raise UserError(f"{path} has no {FOLDER_META} that tells its frame rate; name one (fps)")
    if len(shapes := {frame.shape for frame in frames}) > 1:
        raise UserError(f"frames of {path} differ in size: {sorted(shape[:2] for shape in shapes)}")
    return Video(frames=torch.from_numpy(np.stack(frames)), fps=float(fps or rate or 0))


def _read_file(path: Path, start: int, stop: int | None) -> tuple[list[Pixels], float | None]:
    try:
        with opened(path) as (container, stream):
            if stream.width * stream.height < THREADS_PAY_FROM:
                stream.thread_type = "NONE"
            frames: list[Pixels] = []
            times: list[Fraction] = []
            for i, frame in enumerate(container.decode(stream)):
                if i == stop:
                    break
                times[i:] = _begin_and_end(frame)
                if i >= start:
                    frames.append(_rgb(frame))
            return frames, _rate_of(container, stream, times)
    except (FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {path}: {error.strerror or error}") from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, VideoStream]]:
    """A container and its first video stream. UserError where it has none, or one of a kind unknown to this
    FFmpeg, as damaged files say; errors of FFmpeg's are the caller's to word."""
    with av.open(path, metadata_errors="replace") as container:
        if not container.streams.video:
            raise UserError(f"{path} has no video stream (only sound?)")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UserError(f"{path} has a video stream of an unknown kind")
        yield container, stream


def _begin_and_end(frame: VideoFrame) -> tuple[Fraction, Fraction]:
    base = Fraction(frame.time_base or 1)
    return (frame.pts or 0) * base, ((frame.pts or 0) + (frame.duration or 0)) * base


def _rgb(frame: VideoFrame) -> Pixels:
    """[H, W, 3], upright."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", threads=1).astype(np.uint16)
        pixels = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        pixels = cast(Pixels, frame.to_ndarray(format="rgb24", threads=1))
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _rate_of(container: Any, stream: VideoStream, times: Sequence[Fraction]) -> float | None:
    if container.format.name == "gif" and times[-1] > times[0]:
        return _rate_of_ticks([round((time - times[0]) * GIF_TICKS) for time in times])
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _rate_of_ticks(ticks: Sequence[int]) -> float:
    """The simplest rate at which every frame starts at its rounded tick; the mean rate where there is none.
    The last tick is the end of the last frame."""
    pairs = [(i, tick) for i, tick in enumerate(ticks) if i]
    slow = max(Fraction(i * GIF_TICKS, 1) / (tick + Fraction(1, 2)) for i, tick in pairs)
    quick = min(Fraction(i * GIF_TICKS, 1) / (tick - Fraction(1, 2)) for i, tick in pairs if tick)
    for denominator in range(1, 1002):
        numerator = math.ceil(slow * denominator)
        if slow <= Fraction(numerator, denominator) <= quick:
            return numerator / denominator
    return GIF_TICKS * (len(ticks) - 1) / ticks[-1]


def _read_folder(folder: Path, start: int, stop: int | None) -> tuple[list[Pixels], float | None]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    meta = folder / FOLDER_META
    try:
        rate = float(read_json(meta, UserError)["fps"]) if meta.is_file() else None
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"fps {rate}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{meta} does not tell the frame rate: {error!r}") from error
    return [read_image(file).numpy() for file in files[start:stop]], rate


def read_image(path: str | Path) -> Tensor:
    """uint8 [H, W, 3] of an image file, upright, alpha over black; UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            upright = _upright(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the image {path}: {str(error).splitlines()[0]}") from error
    return torch.from_numpy(np.array(upright))


def _upright(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I"):  # 16-bit grey, which Pillow would clip
        image = Image.fromarray((np.array(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")
