"""Pictures and films as data addresses, so that the report is one file that needs nothing else."""

from __future__ import annotations

import base64
import io
from fractions import Fraction

import av
import torch
from PIL import Image
from torch import Tensor

from shared.video import Video

FILM_SIDE = 256  # small videos are enlarged by whole pixels: 4:2:0 colour would smear them at their own size
STRIP_FRAMES = 6
X264 = {"crf": "18", "preset": "veryfast", "g": "8", "threads": "1"}  # a key frame a second, for seeking


def film(video: Video, *, side: int = FILM_SIDE) -> str:
    """The video as a `data:video/mp4` address (H.264, for eyes; no metric reads it)."""
    frames = enlarged(video.frames, side).numpy()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(video.fps).limit_denominator(1001), options=X264
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


def strip(video: Video, *, num_frames: int = STRIP_FRAMES) -> Tensor:
    """Evenly spaced frames side by side, uint8 [H, W', 4]; the gaps between them are transparent."""
    picked = torch.linspace(0, video.num_frames - 1, min(num_frames, video.num_frames)).round().long()
    opaque = torch.full((*video.frames.shape[1:3], 1), 255, dtype=torch.uint8)
    gap = torch.zeros(video.height, max(1, video.width // 20), 4, dtype=torch.uint8)
    tiles: list[Tensor] = []
    for index in picked.tolist():
        tiles += [torch.cat([video.frames[index], opaque], dim=2), gap]
    return torch.cat(tiles[:-1], dim=1)


def picture(pixels_HWC: Tensor) -> str:
    """uint8 [H, W, 3 or 4] as a `data:image/png` address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC.contiguous().numpy()).save(buffer, format="PNG", optimize=True)
    return data_address(buffer.getvalue(), "image/png")


def data_address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
