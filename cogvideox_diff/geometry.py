"""Pixels, latents and patches of one video, and which sizes and frame counts are legal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from cogvideox_diff.config import CogVideoXConfig, FramePadding
from shared.errors import SettingError

MOST_SIDE = 65536  # pixels; far beyond, tensors cannot be counted any more
MOST_FRAMES = 2**20

FitFrames = Literal["nearest", "pad", "trim"]


def frames_to_pad(num_latent_frames: int, patch_t: int, padding: FramePadding = "front") -> int:
    """Latent frames to add so that patches of `patch_t` frames fit; pairs: 11, 12, 13 -> 1, 0, 1."""
    if padding == "back" and patch_t > 1:
        # Quirk(back_padding_when_aligned): finetrainers adds a whole patch where none is needed: 12 -> 14
        return patch_t - num_latent_frames % patch_t
    return -num_latent_frames % patch_t


def fit_frames(num_frames: int, step: int, most: int, how: FitFrames) -> int:
    """The legal count step * N + 1 that `num_frames` becomes: "trim" the next one below, "pad" the next one
    above, "nearest" the nearer (of two the larger). SettingError for pad beyond `most` and for no frames."""
    if how not in get_args(FitFrames):
        raise SettingError(f"fit_frames must be one of {', '.join(get_args(FitFrames))}, got {how!r}")
    if num_frames < 1:
        raise SettingError(f"frame count must be at least 1, got {num_frames}; nearest: 1")
    if how == "nearest":
        return nearest_frames(num_frames, step, most)
    if how == "trim":
        return min((num_frames - 1) // step * step + 1, most)
    count = -(-(num_frames - 1) // step) * step + 1
    if count > most:
        raise SettingError(f"cannot pad {num_frames} frames: the most is {most}; legal: fit_frames trim")
    return count


def latent_frames(num_frames: int, time_factor: int = 4) -> int:
    """4k+1 frames are k+1 latent frames; other counts raise SettingError."""
    if num_frames < 1 or (num_frames - 1) % time_factor:
        nearest = nearest_frames(num_frames, time_factor)
        raise SettingError(f"frame count must be {time_factor}k+1, got {num_frames}; nearest: {nearest}")
    return (num_frames - 1) // time_factor + 1


def nearest_frames(num_frames: int, step: int, most: int | None = None) -> int:
    """The legal count step * N + 1 nearest to `num_frames` (the larger of two), at most `most`."""
    count = max(0, math.floor((num_frames - 1) / step + 0.5)) * step + 1
    return count if most is None else min(count, most)


def nearest_multiple(size: int, unit: int, most: int | None = None) -> int:
    """The positive multiple of `unit` nearest to `size` (the larger of two), at most `most`."""
    multiple = max(1, math.floor(size / unit + 0.5)) * unit
    return multiple if most is None else min(multiple, most // unit * unit)


def fit_short_side(height: int, width: int, short: int = 768, unit: int = 16) -> tuple[int, int]:
    """(height, width) with the short side `short`, the long one at the nearest multiple of `unit`, ties up:
    what SAT-1.5 resizes an image to."""
    small, large = sorted((height, width))
    long = (2 * large * short + small * unit) // (2 * small * unit) * unit  # in integers: ties are exact
    return (short, long) if height <= width else (long, short)


@dataclass(frozen=True, kw_only=True)
class VideoGeometry:
    """One video's sizes; SettingError names the nearest legal value. `frame_step` N + 1 frames are legal up
    to `max_frames`; a side must be a multiple of `units` and at most `max_size`."""

    height: int  # pixels
    width: int
    num_frames: int
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (t, h, w)
    time_factor: int = 4
    space_factor: int = 8
    frame_step: int = 8
    max_frames: int = 49
    max_size: tuple[int, int] | None = None  # (height, width) in pixels
    only_size: tuple[int, int] | None = None  # models with a learned position table
    padding: FramePadding = "front"

    def __post_init__(self) -> None:
        self._check_frames()
        if self.padding not in get_args(FramePadding):
            legal = ", ".join(get_args(FramePadding))
            raise SettingError(f"frame_padding must be one of {legal}, got {self.padding!r}")
        if self.only_size is not None and (self.height, self.width) != self.only_size:
            legal = "x".join(map(str, self.only_size))
            raise SettingError(
                f"this model makes {legal} (height x width) only, got {self.height}x{self.width}"
            )
        if max(self.height, self.width) > MOST_SIDE:
            raise SettingError(
                f"height and width must be at most {MOST_SIDE}, got {self.height}x{self.width}"
            )
        limits = self.max_size or (None, None)
        for name, size, unit, most in zip(("height", "width"), self.size, self.units, limits, strict=True):
            if size < 1 or size % unit or (most is not None and size > most):
                legal = f"a multiple of {unit}" + (f" up to {most}" if most is not None else "")
                nearest = nearest_multiple(size, unit, most)
                raise SettingError(f"{name} must be {legal}, got {size}; nearest: {nearest}")

    def _check_frames(self) -> None:
        count, step, most = self.num_frames, self.frame_step, self.max_frames
        if count < 1 or count > most or (count - 1) % step:
            nearest = nearest_frames(count, step, most)
            raise SettingError(f"frame count must be {step}N+1 up to {most}, got {count}; nearest: {nearest}")

    @staticmethod
    def of(
        config: CogVideoXConfig,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        padding: FramePadding = "front",
    ) -> VideoGeometry:
        """The geometry of a request; what is None is the model's native value."""
        native, vae, net = config.geometry, config.vae, config.transformer
        factor = vae.space_factor
        table_size = (net.sample_size[1] * factor, net.sample_size[2] * factor)
        return VideoGeometry(
            height=native.height if height is None else height,
            width=native.width if width is None else width,
            num_frames=native.num_frames if num_frames is None else num_frames,
            patch_size=net.patch_size,
            time_factor=vae.time_factor,
            space_factor=factor,
            frame_step=native.frame_step,
            max_frames=native.max_frames,
            max_size=table_size if net.position != "sincos" and net.grid_rule == "slice" else None,
            only_size=table_size if net.position == "rope+learned" else None,
            padding=padding,
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def units(self) -> tuple[int, int]:
        """Pixels of one patch (down, across)."""
        return self.space_factor * self.patch_size[1], self.space_factor * self.patch_size[2]

    @property
    def latent_size(self) -> tuple[int, int]:
        """(rows, columns) of the latents."""
        return self.height // self.space_factor, self.width // self.space_factor

    @property
    def latent_frames(self) -> int:
        """Latent frames of the video itself, without padding."""
        return latent_frames(self.num_frames, self.time_factor)

    @property
    def frames_to_pad(self) -> int:
        """Latent frames that sampling adds and removes before decoding."""
        return frames_to_pad(self.latent_frames, self.patch_size[0], self.padding)

    @property
    def padded_latent_frames(self) -> int:
        return self.latent_frames + self.frames_to_pad

    @property
    def own_frames(self) -> slice:
        """Where the video's own latent frames are among the padded ones."""
        start = self.frames_to_pad if self.padding == "front" else 0
        return slice(start, start + self.latent_frames)

    def latent_shape(self, channels: int) -> tuple[int, int, int, int]:
        """(T, C, H, W) of one sample as the transformer sees it, padding included."""
        return self.padded_latent_frames, channels, *self.latent_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches (time, rows, columns)."""
        t, h, w = self.patch_size
        return self.padded_latent_frames // t, self.latent_size[0] // h, self.latent_size[1] // w

    @property
    def num_tokens(self) -> int:
        """Video tokens; the sequence has the text tokens in front of them."""
        return math.prod(self.grid)
