"""The demo world: what is drawn is what is read, and the held-out split is fair."""

from __future__ import annotations

from collections import Counter
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.clips import shapes
from shared.clips.shapes import ATTRIBUTES, Caption, Scene
from shared.losses import edge_weight
from shared.video import Video
from shared.video_io import read_video, write_video


def some_scenes(num: int, *, split: shapes.Split = "all", seed: int = 5) -> list[Scene]:
    return list(islice(shapes.scenes(split, seed), num))


def wrong(scenes: list[Scene], videos: list[Video]) -> Counter[str]:
    """How often each attribute is misread; "invalid" counts videos that the oracle rejects."""
    found: Counter[str] = Counter()
    for scene, video in zip(scenes, videos, strict=True):
        reading = shapes.read(video)
        found.update(name for name in ATTRIBUTES if getattr(reading, name) != getattr(scene.caption, name))
        found["invalid"] += not reading.valid
    return +found


def flat_video(value: int, *, frames: int = 17) -> Video:
    return Video(frames=torch.full((frames, 64, 64, 3), value, dtype=torch.uint8), fps=8.0)


# ---- the oracle on what the world draws


def test_ground_truth_is_read_right() -> None:
    scenes = some_scenes(420)
    found = wrong(scenes, [shapes.render(scene) for scene in scenes])
    assert all(count <= 0.005 * len(scenes) for count in found.values()), found


def test_every_caption_of_the_heldout_split_is_read_right() -> None:
    rng = np.random.default_rng(3)
    scenes = [shapes.draw_scene(rng, caption=caption) for caption in shapes.captions("heldout")]
    found = wrong(scenes, [shapes.render(scene) for scene in scenes])
    assert all(count <= 0.005 * len(scenes) for count in found.values()), found


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
def test_files_are_read_right(suffix: str, tmp_path: Path) -> None:
    scenes = some_scenes(6, seed=6)
    paths = [write_video(shapes.render(s), tmp_path / f"{i}{suffix}") for i, s in enumerate(scenes)]
    assert not wrong(scenes, [read_video(path) for path in paths])


def test_many_clips_survive_mp4(tmp_path: Path) -> None:
    """Sixty clips one after the other in a single file, which is quicker than sixty files."""
    scenes = some_scenes(60, seed=12)
    joined = torch.cat([shapes.render(scene).frames for scene in scenes])
    path = write_video(Video(frames=joined, fps=8.0), tmp_path / "all.mp4")
    clips = read_video(path).frames.unflatten(0, (60, 17))
    assert not wrong(scenes, [Video(frames=clip, fps=8.0) for clip in clips])


@pytest.mark.parametrize("num_frames", [5, 9])
def test_short_clips_are_read_right(num_frames: int) -> None:
    scenes = some_scenes(100, seed=7)
    assert not wrong(scenes, [shapes.render(scene, num_frames=num_frames) for scene in scenes])


@pytest.mark.parametrize("size", [128, 96])
def test_other_sizes_are_read_right(size: int) -> None:
    scenes = some_scenes(40, seed=8)
    assert not wrong(scenes, [shapes.render(scene, size=size) for scene in scenes])


def test_travel_and_velocity_are_in_world_pixels() -> None:
    for scene in some_scenes(30, seed=9):
        whole, short = shapes.read(shapes.render(scene)), shapes.read(shapes.render(scene, num_frames=9))
        large = shapes.read(shapes.render(scene, size=128))
        assert abs(whole.travel - scene.travel) < 0.7
        assert abs(large.travel - scene.travel) < 0.7
        assert abs(short.travel - scene.travel / 2) < 0.7
        assert whole.velocity == pytest.approx(whole.travel / 16 * 8)


def test_a_wrong_motion_is_noticed() -> None:
    """The oracle reads pixels: a clip played backwards moves the other way, a frozen one stands still."""
    backwards = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for scene in (s for s in some_scenes(20, seed=10) if s.caption.motion != "still"):
        frames = shapes.render(scene).frames
        assert shapes.read(Video(frames=frames.flip(0), fps=8.0)).motion == backwards[scene.caption.motion]
        assert shapes.read(Video(frames=frames[:1].expand(17, -1, -1, -1), fps=8.0)).motion == "still"


def test_agrees_compares_only_what_was_asked() -> None:
    (scene,) = some_scenes(1)
    reading = shapes.read(shapes.render(scene))
    other = next(c for c in shapes.COLOURS if c != scene.caption.colour)
    assert reading.agrees({"colour": other, "shape": scene.caption.shape}) == {"colour": False, "shape": True}


# ---- broken videos


def broken_videos() -> dict[str, Video]:
    generator = torch.Generator().manual_seed(0)
    halves = flat_video(14).frames.clone()
    halves[:, :, 32:] = torch.tensor([220, 40, 40], dtype=torch.uint8)
    columns = flat_video(242).frames.clone()
    columns[:, :, ::2] = torch.tensor([45, 75, 230], dtype=torch.uint8)
    flash = flat_video(14).frames.clone()
    flash[3] = shapes.render(some_scenes(1)[0]).frames[0]
    noise = torch.randint(256, (17, 64, 64, 3), generator=generator).to(torch.uint8)
    return {
        "noise": Video(frames=noise, fps=8.0),
        "black": flat_video(0),
        "white": flat_video(255),
        "one black frame": flat_video(0, frames=1),
        "two halves": Video(frames=halves, fps=8.0),
        "stripes": Video(frames=columns, fps=8.0),
        "object in one frame only": Video(frames=flash, fps=8.0),
        "one pixel": Video(frames=torch.zeros(1, 1, 1, 3, dtype=torch.uint8), fps=8.0),
        "wide noise": Video(frames=noise[:2, :10].repeat(1, 1, 3, 1), fps=24.0),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", broken_videos())
def test_broken_videos_are_not_valid(name: str) -> None:
    assert not shapes.read(broken_videos()[name]).valid


def test_an_object_that_is_seldom_there_is_not_valid() -> None:
    (scene,) = some_scenes(1)
    frames = shapes.render(scene).frames.clone()
    frames[::2] = frames[0, 0, 0]  # background
    assert not shapes.read(Video(frames=frames, fps=8.0)).valid


# ---- the splits


def test_a_fifth_of_the_triples_is_held_out() -> None:
    triples = {(c.colour, c.shape, c.motion): c.held_out for c in shapes.captions()}
    assert len(triples) == len(shapes.COLOURS) * len(shapes.SHAPES) * len(shapes.MOTIONS)
    assert sum(triples.values()) == len(triples) / 5


def test_splits_share_no_triple_and_make_up_the_whole() -> None:
    said = {split: set(shapes.captions(split)) for split in ("train", "heldout", "all")}
    assert said["train"] | said["heldout"] == said["all"]
    triples = [{(c.colour, c.shape, c.motion) for c in said[split]} for split in ("train", "heldout")]
    assert not triples[0] & triples[1]


@pytest.mark.parametrize("pair", [("colour", "shape"), ("motion", "colour"), ("motion", "shape")])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_value_and_pair_is_seen(pair: tuple[str, str], split: shapes.Split) -> None:
    """In training every pair, so a held-out prompt combines known parts anew; held out, every value."""
    legal = {"colour": shapes.COLOURS, "shape": shapes.SHAPES, "motion": shapes.MOTIONS}
    seen = {tuple(getattr(c, name) for name in pair) for c in shapes.captions(split)}
    if split == "train":
        assert seen == set(product(*(legal[name] for name in pair)))
    for place, name in enumerate(pair):
        assert {values[place] for values in seen} == set(legal[name])


def test_training_sees_every_speed_and_background_with_every_motion() -> None:
    seen = {(c.motion, c.speed, c.background) for c in shapes.captions("train")}
    moving = product([m for m in shapes.MOTIONS if m != "still"], shapes.SPEEDS, shapes.BACKGROUNDS)
    assert seen == {*moving, *product(["still"], [None], shapes.BACKGROUNDS)}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scenes_belong_to_their_split(split: shapes.Split) -> None:
    assert {s.caption.held_out for s in some_scenes(200, split=split)} == {split == "heldout"}


def test_motions_are_drawn_evenly() -> None:
    counts = Counter(s.caption.motion for s in some_scenes(2000, split="train"))
    assert all(0.15 < counts[motion] / 2000 < 0.25 for motion in shapes.MOTIONS), counts


def test_the_object_never_leaves_the_frame() -> None:
    for scene in some_scenes(60, seed=11):
        frames = shapes.render(scene).frames
        ground = torch.tensor(scene.background_rgb).round().to(torch.uint8)
        border = torch.cat([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]])
        assert (border.int() - ground.int()).abs().max() <= 1


# ---- determinism


def test_batches_are_a_function_of_seed_and_step() -> None:
    first, again = (shapes.batch(3, 8, 4) for _ in range(2))
    assert [s for s, _ in first] == [s for s, _ in again]
    assert all(torch.equal(a.frames, b.frames) for (_, a), (_, b) in zip(first, again, strict=True))
    for seed, step in ((3, 9), (4, 8)):
        assert [s for s, _ in shapes.batch(seed, step, 4)] != [s for s, _ in first]


def test_stills_are_a_function_of_seed_and_step() -> None:
    (pixels, said), (again, said_again) = (shapes.stills(3, 8, 4) for _ in range(2))
    assert torch.equal(pixels, again) and said == said_again
    assert not torch.equal(pixels, shapes.stills(3, 9, 4)[0])
    assert pixels.shape == (4, 3, 64, 64) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1


def test_stills_show_what_their_captions_say() -> None:
    for frame, caption in zip(*shapes.stills(1, 0, 30), strict=True):
        reading = shapes.read(Video.from_pixels(frame[:, None], 8.0))
        wanted = {name: getattr(caption, name) for name in ("colour", "shape", "background")}
        assert reading.valid and all(reading.agrees(wanted).values())


def test_a_short_clip_is_the_beginning_of_a_long_one() -> None:
    (scene,) = some_scenes(1)
    whole, short = shapes.render(scene), shapes.render(scene, num_frames=5)
    assert torch.equal(whole.frames[:5], short.frames)
    assert whole.frames.shape == (17, 64, 64, 3) and whole.fps == 8.0


# ---- words


def test_parse_inverts_text() -> None:
    for caption in shapes.captions():
        assert shapes.parse(caption.text) == caption.attributes()


def test_parse_of_a_still_leaves_motion_open() -> None:
    caption = shapes.captions()[0]
    wanted = {name: getattr(caption, name) for name in ("colour", "shape", "background")}
    assert shapes.parse(caption.image_text) == wanted


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("", {}),
        ("A RED circle!", {"colour": "red", "shape": "circle"}),
        ("a cat on a black sofa", {}),
        (
            "green square, quickly up",
            {"colour": "green", "shape": "square", "motion": "up", "speed": "quickly"},
        ),
        ("on a purple background", {"colour": "purple"}),
    ],
)
def test_parse_of_free_prompts(prompt: str, found: dict[str, str]) -> None:
    assert shapes.parse(prompt) == found


def test_texts_are_all_different() -> None:
    every = shapes.captions()
    assert len({caption.text for caption in every}) == len(every) == len(set(every))


def test_an_unknown_shape_is_named() -> None:
    zero = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match=r"'star'.*circle"):
        shapes.distance("star", zero, zero, zero)


# ---- prompts of the benchmark


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_prompts_are_balanced_and_of_their_split(split: shapes.Split) -> None:
    chosen = shapes.prompts(split, 40)
    assert set(Counter(c.motion for c in chosen).values()) == {8}
    assert set(chosen) <= set(shapes.captions(split))
    assert shapes.prompts(split, 40) == chosen != shapes.prompts(split, 40, seed=1)
    assert shapes.prompts(split, 10) == chosen[:10]


def test_prompts_repeat_only_when_a_motion_is_used_up() -> None:
    chosen = shapes.prompts("heldout", 400)
    pools = Counter(c.motion for c in shapes.captions("heldout"))
    for motion, pool in pools.items():
        mine: list[Caption] = [c for c in chosen if c.motion == motion]
        for start in range(0, len(mine), pool):
            cycle = mine[start : start + pool]
            assert len(set(cycle)) == len(cycle)


# ---- the weight that the codecs' losses give to outlines


@pytest.mark.parametrize("size", [(2, 3, 16, 16), (2, 3, 4, 16, 16)])
def test_edge_weight_marks_outlines_inside_a_frame(size: tuple[int, ...]) -> None:
    pixels = torch.full(size, -1.0)
    pixels[..., 8:] = 1.0
    if len(size) == 5:
        pixels[:, :, 2:] *= -1  # a cut in time is no outline
    weight = edge_weight(pixels, edge=6.0)
    assert weight.shape == (size[0], 1, *size[2:])
    assert torch.equal(weight[..., 7], torch.full_like(weight[..., 7], 7.0))
    assert (weight[..., :7] == 1).all() and (weight[..., 8:] == 1).all()
