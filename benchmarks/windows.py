"""The window that videos are looked at through: the same seconds, rate and size for every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F

from benchmarks.metrics.base import RefusedError
from shared.config_io import check_type
from shared.errors import SettingError
from shared.video import Video

LARGEST = 1e6


@dataclass(frozen=True, kw_only=True)
class Window:
    """The first `seconds` of a video at `fps`, its middle cut to the aspect of the size and shrunk to it.

    Never invents: a video that is shorter, slower or smaller than the window is refused.
    """

    seconds: float
    fps: float
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("seconds", "fps", "height", "width"):
            if not 0 < getattr(self, name) < LARGEST:
                raise SettingError(
                    f"window: {name} must be positive and below {LARGEST:g}, got {getattr(self, name)}"
                )
        if self.num_frames < 1:
            raise SettingError(f"window: {self.seconds:g} s at {self.fps:g} fps hold no frame")

    def __str__(self) -> str:
        return f"{self.seconds:g},{self.fps:g},{self.height},{self.width}"

    @property
    def num_frames(self) -> int:
        return round(self.seconds * self.fps)

    @property
    def words(self) -> str:
        return f"the first {self.seconds:g} s at {self.fps:g} fps, {self.width}x{self.height}"

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Window:
        """From the `window` of a suite's JSON."""
        if plain.keys() != {"seconds", "fps", "height", "width"}:
            raise SettingError(f"a window has seconds, fps, height and width; got {', '.join(plain)}")
        try:
            for name, hint in get_type_hints(Window).items():
                check_type(hint, plain[name], f"window: {name}")
        except ValueError as error:
            raise SettingError(str(error)) from error
        return Window(**plain)

    @staticmethod
    def parse(text: str) -> Window:
        """From SECONDS,FPS,HEIGHT,WIDTH."""
        words = text.split(",")
        try:
            seconds, fps, height, width = float(words[0]), float(words[1]), int(words[2]), int(words[3])
        except (ValueError, IndexError) as error:
            raise SettingError(f"a window is SECONDS,FPS,HEIGHT,WIDTH, got {text!r}") from error
        return Window(seconds=seconds, fps=fps, height=height, width=width)

    def look(self, video: Video) -> Video:
        """What is seen of a video. RefusedError where it does not fill the window."""
        if reason := self.unfit(video):
            raise RefusedError(f"{reason}; the window is {self.words}")
        times = torch.arange(self.num_frames, dtype=torch.float64) / self.fps
        frames = video.frames[(times * video.fps + 1e-6).floor().long()]  # what is on the screen at that time
        return Video(frames=_fit(frames, self.height, self.width), fps=self.fps)

    def unfit(self, video: Video) -> str:
        """Why the video does not fill the window, or ""."""
        if video.seconds + 1e-6 < self.seconds:
            return f"the video lasts {video.seconds:g} s"
        if video.fps + 1e-6 < self.fps:
            return f"the video has {video.fps:g} fps"
        if video.height < self.height or video.width < self.width:
            return f"the video has {video.width}x{video.height}"
        return ""


def _fit(frames_THWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 frames, cut in the middle to the aspect and shrunk by averaging (antialiased bilinear)."""
    old_height, old_width = frames_THWC.shape[1:3]
    scale = min(old_height / height, old_width / width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (old_height - rows) // 2, (old_width - columns) // 2
    cut_THWC = frames_THWC[:, top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return cut_THWC.contiguous()
    pixels_TCHW = cut_THWC.permute(0, 3, 1, 2).float()  # [T, H, W, C] -> [T, C, H, W]
    small_TCHW = F.interpolate(pixels_TCHW, size=(height, width), mode="bilinear", antialias=True)
    return (
        small_TCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    )  # -> [T, H, W, C]
