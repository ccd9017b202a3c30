"""A small world of moving shapes whose every clip can be described in a sentence and read back from pixels.

It is the data of the demo models, of the training tests and of the metric "prompt accuracy". A `Scene` says
what happens, `render` draws it, `caption` tells it, and `read` (the oracle) recovers the scene's attributes
from the frames of any video. Sizes are pixels of a 64 x 64 frame, speeds are for 17 frames at 8 per second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shared.video import Video

SIZE = 64
NUM_FRAMES = 17
FPS = 8.0
RADIUS = (9.5, 12.5)
TRAVEL = {"slowly": (10.0, 14.0), "quickly": (24.0, 29.0)}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 175, 60),
    "blue": (45, 75, 230),
    "yellow": (235, 215, 45),
    "purple": (150, 55, 200),
    "cyan": (60, 210, 220),
}
BACKGROUNDS = {"black": 14, "gray": 128, "white": 242}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "still": (0.0, 0.0),
}
MOTIONS = tuple(DIRECTIONS)
SPEEDS = tuple(TRAVEL)
ATTRIBUTES = ("colour", "shape", "motion", "speed", "background")

# The oracle's borders, in pixels of travel over a whole 17-frame clip.
STILL_BELOW = 4.0
QUICK_ABOVE = 19.0
MIN_OVERLAP = 0.7
MIN_PRESENCE = 0.8

Split = Literal["train", "heldout", "all"]
Array = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a prompt of this world says; `speed` is None for a shape that stands still."""

    colour: str
    shape: str
    motion: str
    speed: str | None
    background: str

    @property
    def text(self) -> str:
        action = "standing still" if self.motion == "still" else f"moving {self.motion} {self.speed}"
        return f"a {self.colour} {self.shape} {action} on a {self.background} background"

    @property
    def image_text(self) -> str:
        """The caption of a single frame, which shows no motion."""
        return f"a {self.colour} {self.shape} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """True for one of five (colour, shape, motion) triples, chosen so that training still sees every pair
        of colour and shape, and every motion with every colour and with every shape."""
        colour = list(COLOURS).index(self.colour)
        return (colour + 2 * SHAPES.index(self.shape) + MOTIONS.index(self.motion)) % 5 == 0

    def attributes(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One clip: its caption and the numbers that the caption leaves open (pixels of a 64 x 64 frame)."""

    caption: Caption
    radius: float
    start: tuple[float, float]  # (x, y) of the centre in the first frame
    travel: float  # over 17 frames
    object_rgb: tuple[float, float, float]
    background_rgb: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the oracle sees. `travel` is the centre's path over the whole video in pixels of a 64-pixel frame,
    `velocity` the same per second, `overlap` the agreement (IoU) with the ideal shape, 0..1."""

    colour: str
    shape: str
    motion: str
    speed: str | None
    background: str
    travel: float
    velocity: float
    overlap: float
    presence: float

    @property
    def valid(self) -> bool:
        """The object is one of the four shapes, and there nearly all the time."""
        return self.overlap > MIN_OVERLAP and self.presence >= MIN_PRESENCE

    def agrees(self, wanted: dict[str, str]) -> dict[str, bool]:
        """For each wanted attribute: is it what the video shows?"""
        return {name: getattr(self, name) == value for name, value in wanted.items()}


def captions(split: Split = "all") -> list[Caption]:
    """Every caption of a split, in a fixed order."""
    every = [
        Caption(colour=c, shape=s, motion=m, speed=v, background=b)
        for c in COLOURS
        for s in SHAPES
        for m in MOTIONS
        for v in ((None,) if m == "still" else SPEEDS)
        for b in BACKGROUNDS
    ]
    return [c for c in every if split == "all" or c.held_out == (split == "heldout")]


def prompts(split: Split, num: int, seed: int = 0) -> list[Caption]:
    """`num` captions of a split in an order drawn from `seed`, balanced over the motions; repeats only when
    the split is used up."""
    rng = np.random.default_rng([seed, 77])
    queues: dict[str, list[Caption]] = {motion: [] for motion in MOTIONS}
    chosen: list[Caption] = []
    while len(chosen) < num:
        motion = MOTIONS[len(chosen) % len(MOTIONS)]
        if not queues[motion]:
            pool = [c for c in captions(split) if c.motion == motion]
            queues[motion] = [pool[i] for i in rng.permutation(len(pool))]
        chosen.append(queues[motion].pop())
    return chosen


def draw_scene(rng: np.random.Generator, split: Split = "train", caption: Caption | None = None) -> Scene:
    """A random scene of a split (or of one caption); the object never leaves the frame."""
    caption = caption or _draw_caption(rng, split)
    radius = rng.uniform(*RADIUS)
    travel = rng.uniform(*TRAVEL[caption.speed]) if caption.speed else 0.0
    dx, dy = DIRECTIONS[caption.motion]
    low, high = radius + 1.5, SIZE - radius - 2.5
    start = []
    for direction in (dx, dy):
        step = direction * travel
        start.append(float(rng.uniform(low - min(step, 0), high - max(step, 0))))
    jitter = rng.uniform(-10, 10, size=3)
    grey = BACKGROUNDS[caption.background] + rng.uniform(-8, 8)
    colour = np.clip(np.array(COLOURS[caption.colour]) + jitter, 0, 255)
    return Scene(
        caption=caption,
        radius=float(radius),
        start=(start[0], start[1]),
        travel=float(travel),
        object_rgb=(float(colour[0]), float(colour[1]), float(colour[2])),
        background_rgb=(float(grey), float(grey), float(grey)),
    )


def _draw_caption(rng: np.random.Generator, split: Split) -> Caption:
    """Motions are drawn evenly; speed doubles the number of captions of a moving shape, not its share."""
    while True:
        motion = MOTIONS[rng.integers(len(MOTIONS))]
        caption = Caption(
            colour=list(COLOURS)[rng.integers(len(COLOURS))],
            shape=SHAPES[rng.integers(len(SHAPES))],
            motion=motion,
            speed=None if motion == "still" else SPEEDS[rng.integers(len(SPEEDS))],
            background=list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        )
        if split == "all" or caption.held_out == (split == "heldout"):
            return caption


def scenes(split: Split, seed: int) -> Iterator[Scene]:
    """An endless stream of scenes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield draw_scene(rng, split)


def render(scene: Scene, *, num_frames: int = NUM_FRAMES, size: int = SIZE) -> Video:
    """Draw a scene: uint8 [num_frames, size, size, 3] at 8 frames per second, edges anti-aliased. A clip
    shorter than 17 frames shows the beginning of the motion, at the same speed."""
    time = np.arange(num_frames, dtype=np.float32) / (NUM_FRAMES - 1)
    dx, dy = DIRECTIONS[scene.caption.motion]
    centre_x = scene.start[0] + dx * scene.travel * time
    centre_y = scene.start[1] + dy * scene.travel * time
    unit = size / SIZE
    coverage = _coverage(
        scene.caption.shape, centre_x * unit, centre_y * unit, np.full(num_frames, scene.radius * unit), size
    )
    colour, ground = (np.array(rgb, np.float32) for rgb in (scene.object_rgb, scene.background_rgb))
    frames = ground + coverage[..., None] * (colour - ground)
    return Video(frames=torch.from_numpy(np.round(frames).astype(np.uint8)), fps=FPS)


def distance(shape: str, x: Array, y: Array, radius: Array) -> Array:
    """Signed distance in pixels to the outline of a shape of that radius centred at 0 (negative inside).
    Every shape's centre of mass is 0, so the oracle may place its templates there."""
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
        case "triangle":  # upright and equilateral; 0.58 radius is the distance from the centre to a side
            slanted = 0.8660254 * np.abs(x) - 0.5 * y
            return np.maximum(slanted, y) - 0.58 * radius
        case "cross":
            wide, narrow = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
            return np.maximum(wide - radius, narrow - 0.34 * radius)
        case _:
            raise ValueError(f"unknown shape {shape!r}; legal: {', '.join(SHAPES)}")


def _coverage(shape: str, centre_x: Array, centre_y: Array, radius: Array, size: int) -> Array:
    """How much of each pixel the shape covers, 0..1, [frames, size, size]."""
    axis = np.arange(size, dtype=np.float32)
    x = axis[None, None, :] - centre_x[:, None, None]
    y = axis[None, :, None] - centre_y[:, None, None]
    x, y = np.broadcast_arrays(x, y)
    return np.clip(0.5 - distance(shape, x, y, radius[:, None, None]), 0, 1).astype(np.float32)


@lru_cache(maxsize=1)
def _unit_areas() -> dict[str, float]:
    """Area of each shape at radius 1, so that the oracle can give its templates the area it sees."""
    centre, radius = np.array([31.5], np.float32), np.array([20.0], np.float32)
    return {shape: float(_coverage(shape, centre, centre, radius, SIZE).sum()) / 400.0 for shape in SHAPES}


def read(video: Video, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> Reading:
    """The oracle: attributes of the object in a video of any length and size (resampled to 64 pixels wide).
    `colours` are those it may name: a world with a new colour tells it as well.

    Background: the border's median. Object: pixels nearer to the object's colour than to the background.
    Shape: overlap with the four ideal shapes at the same centre and area. Motion: straight line through the
    centres of all frames.
    """
    frames = _at_world_size(video)
    border = np.concatenate(
        [frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3), frames[:, :, :2].reshape(-1, 3)]
    )
    ground = np.median(border, axis=0)
    mask, colour = _object_mask(frames, ground)
    area = mask.sum(axis=(1, 2))
    seen = area >= 40
    background = min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - float(ground.mean())))
    if (seen.sum() < 2 and len(frames) > 1) or not seen.any():
        return Reading(
            colour="none", shape="none", motion="none", speed=None, background=background,
            travel=0.0, velocity=0.0, overlap=0.0, presence=float(seen.mean()),
        )  # fmt: skip
    centre_x, centre_y = _centres(mask, area)
    shape, overlap = _shape(mask[seen], area[seen], centre_x[seen], centre_y[seen])
    travel = _travel(centre_x, centre_y, seen)
    motion, speed, length = _motion(travel, (len(frames) - 1) / video.fps)
    return Reading(
        colour=_nearest_colour(colour, ground, colours), background=background,
        shape=shape, motion=motion, speed=speed,
        travel=length, velocity=length / max(len(frames) - 1, 1) * video.fps,
        overlap=overlap, presence=float(seen.mean()),
    )  # fmt: skip


def _at_world_size(video: Video) -> Array:
    """float32 [T, 64, 64, 3]; a whole factor is averaged, anything else resampled."""
    frames = video.frames.float()
    if (video.height, video.width) != (SIZE, SIZE):
        channels_first = frames.permute(0, 3, 1, 2)  # [T, H, W, C] -> [T, C, H, W]
        resized = torch.nn.functional.interpolate(
            channels_first, (SIZE, SIZE), mode="bilinear", antialias=True
        )
        frames = resized.permute(0, 2, 3, 1)
    return frames.numpy()


def _object_mask(frames: Array, ground: Array) -> tuple[Array, Array]:
    """Soft membership 0..1 [T, 64, 64] and the object's mean colour. The mask is the position of each pixel
    on the line from background to object colour, so that blurred edges count by half."""
    offset = frames - ground
    size = np.sqrt((offset**2).sum(-1))
    strong = size > max(45.0, 0.6 * float(np.quantile(size, 0.995)))
    if strong.sum() < 20:
        return np.zeros(frames.shape[:3], np.float32), ground
    colour = np.median(frames[strong], axis=0)
    axis = colour - ground
    squared = float(axis @ axis)
    if squared < 1:  # strong pixels of opposite colours around the background: no object
        return np.zeros(frames.shape[:3], np.float32), ground
    along = (offset @ axis) / squared
    along[size < 0.2 * np.sqrt(squared)] = 0
    return np.clip(along, 0, 1).astype(np.float32), colour


def _centres(mask: Array, area: Array) -> tuple[Array, Array]:
    axis = np.arange(SIZE, dtype=np.float32)
    area = np.maximum(area, 1e-6)
    return (mask.sum(1) @ axis) / area, (mask.sum(2) @ axis) / area


def _shape(mask: Array, area: Array, centre_x: Array, centre_y: Array) -> tuple[str, float]:
    """The best of the four shapes and its mean overlap over the frames."""
    overlaps = {}
    for shape in SHAPES:
        radius = np.sqrt(area / _unit_areas()[shape])
        ideal = _coverage(shape, centre_x, centre_y, radius, SIZE)
        common, union = np.minimum(mask, ideal).sum((1, 2)), np.maximum(mask, ideal).sum((1, 2))
        overlaps[shape] = float((common / union).mean())
    best = max(overlaps, key=lambda name: overlaps[name])
    return best, overlaps[best]


def _travel(centre_x: Array, centre_y: Array, seen: NDArray[np.bool_]) -> tuple[float, float]:
    """Displacement from the first to the last frame along the least-squares line through the centres."""
    time = np.flatnonzero(seen).astype(np.float64)
    if len(time) < 2:
        return 0.0, 0.0
    slope_x, slope_y = (np.polyfit(time, centre[seen], 1)[0] for centre in (centre_x, centre_y))
    return float(slope_x) * (len(seen) - 1), float(slope_y) * (len(seen) - 1)


def _motion(travel: tuple[float, float], seconds: float) -> tuple[str, str | None, float]:
    """Direction, speed word and length of the path; the borders are for a whole clip's 2 seconds."""
    length = float(np.hypot(*travel))
    whole = length * (NUM_FRAMES - 1) / FPS / seconds if seconds else 0.0
    if whole < STILL_BELOW:
        return "still", None, length
    x, y = travel
    motion = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
    return motion, "quickly" if whole > QUICK_ABOVE else "slowly", length


def _nearest_colour(colour: Array, ground: Array, colours: Mapping[str, tuple[int, int, int]]) -> str:
    if float(np.abs(colour - ground).max()) < 1:
        return "none"
    return min(colours, key=lambda name: float(((np.array(colours[name]) - colour) ** 2).sum()))


def parse(prompt: str) -> dict[str, str]:
    """The attributes that a prompt names, by its words: {"colour": "red", "shape": "circle", ...}. Attributes
    it leaves open are absent, so a metric asks only for what was asked for."""
    words = re.findall(r"[a-z]+", prompt.lower())
    found: dict[str, str] = {}
    for name, legal in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS), ("speed", SPEEDS)):
        for word in words:
            if word in legal:
                found.setdefault(name, word)
    ground = re.search(r"\b(\w+) background", prompt.lower())
    if ground and ground[1] in BACKGROUNDS:
        found["background"] = ground[1]
    return found


def batch(
    seed: int, step: int, size: int, *, num_frames: int = NUM_FRAMES, split: Split = "train"
) -> list[tuple[Scene, Video]]:
    """The clips of one training step: a function of (seed, step), so a resumed run sees the same data."""
    rng = np.random.default_rng([seed, step])
    drawn = [draw_scene(rng, split) for _ in range(size)]
    return [(scene, render(scene, num_frames=num_frames)) for scene in drawn]


def stills(seed: int, step: int, size: int, *, split: Split = "train") -> tuple[torch.Tensor, list[Caption]]:
    """Single frames for image training: float32 [size, 3, 64, 64] in -1..1 and their captions. The object
    stands where it may be at any moment of a clip."""
    rng = np.random.default_rng([seed, step, 1])
    pixels, said = [], []
    for _ in range(size):
        scene = draw_scene(rng, split)
        moment = int(rng.integers(NUM_FRAMES))
        dx, dy = DIRECTIONS[scene.caption.motion]
        moved = scene.travel * moment / (NUM_FRAMES - 1)
        scene = replace(scene, start=(scene.start[0] + dx * moved, scene.start[1] + dy * moved))
        pixels.append(render(scene, num_frames=1).to_pixels()[:, 0])
        said.append(scene.caption)
    return torch.stack(pixels), said
