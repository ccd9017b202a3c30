"""Pictures and films as data addresses, so that the report is one file that needs nothing else."""

from __future__ import annotations

import base64
import io
from fractions import Fraction

import av
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared.video import Video

FILM_SIDE = 256  # small videos are enlarged by whole pixels: 4:2:0 colour would smear them at their own size
LARGEST_SIDE = 480  # larger ones are made smaller: the page is for eyes, the frames lie beside it
TILE_SIDE = 160  # of a strip
STRIP_FRAMES = 6
PNG_PIXELS = 200_000  # larger pictures are WebP
X264 = {"crf": "18", "preset": "veryfast", "g": "8", "threads": "1"}  # a key frame a second, for seeking


def film(video: Video, *, side: int = FILM_SIDE) -> str:
    """The video as a `data:video/mp4` address (H.264, for eyes; no metric reads it)."""
    frames = enlarged(reduced(video.frames, LARGEST_SIDE), side).numpy()
    options = X264 if frames.shape[1] * frames.shape[2] <= 2 * FILM_SIDE**2 else {**X264, "crf": "24"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(video.fps).limit_denominator(1001), options=options
        )
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            # one thread: starting more costs many times the work on frames of this size
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode())
    return data_address(buffer.getvalue(), "video/mp4")


def enlarged(frames_THWC: Tensor, side: int) -> Tensor:
    """Frames repeated by the whole factor that brings the longer side near `side`; both sides made even."""
    height, width = frames_THWC.shape[1:3]
    factor = max(1, side // max(height, width))
    large = frames_THWC.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return large[:, : large.shape[1] // 2 * 2, : large.shape[2] // 2 * 2].contiguous()


def reduced(frames_THWC: Tensor, side: int) -> Tensor:
    """Frames whose longer side is at most `side`, by means over areas."""
    height, width = frames_THWC.shape[1:3]
    if max(height, width) <= side:
        return frames_THWC
    size = [max(2, round(length * side / max(height, width))) for length in (height, width)]
    small = F.interpolate(frames_THWC.permute(0, 3, 1, 2).float(), size=size, mode="area")  # [T, C, H, W]
    return small.permute(0, 2, 3, 1).round().to(torch.uint8)


def poster(video: Video) -> Tensor:
    """The middle frame, uint8 [H, W, 3], near 128 pixels or smaller than a film."""
    return enlarged(reduced(video.frames[video.num_frames // 2][None], LARGEST_SIDE), 128)[0]


def strip(video: Video, *, num_frames: int = STRIP_FRAMES) -> Tensor:
    """Evenly spaced frames side by side, uint8 [H, W', 4]; the gaps between them are transparent."""
    picked = torch.linspace(0, video.num_frames - 1, min(num_frames, video.num_frames)).round().long()
    frames_THWC = reduced(video.frames[picked], TILE_SIDE)
    height, width = frames_THWC.shape[1:3]
    opaque = torch.full((height, width, 1), 255, dtype=torch.uint8)
    gap = torch.zeros(height, max(1, width // 20), 4, dtype=torch.uint8)
    tiles: list[Tensor] = []
    for frame_HWC in frames_THWC:
        tiles += [torch.cat([frame_HWC, opaque], dim=2), gap]
    return torch.cat(tiles[:-1], dim=1)


def picture(pixels_HWC: Tensor) -> str:
    """uint8 [H, W, 3 or 4] as a `data:image/png` address, or WebP where that would be large."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels_HWC.contiguous().numpy())
    if image.width * image.height > PNG_PIXELS:
        image.save(buffer, format="WEBP", quality=82)
        return data_address(buffer.getvalue(), "image/webp")
    image.save(buffer, format="PNG", optimize=True)
    return data_address(buffer.getvalue(), "image/png")


def data_address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
