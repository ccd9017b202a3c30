"""The measure of examples/recursive_interpolation.py: true motion passes, motion out of order does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.clips import shapes
from shared.video import Video

FILE = Path(__file__).parents[2] / "examples" / "recursive_interpolation.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recursive_interpolation", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


example = load()


def paths(order: list[int]) -> list[Tensor]:
    """Of true clips, their frames in this order."""
    random = np.random.default_rng(3)
    captions = [c for c in shapes.prompts("heldout", 60) if c.speed == "quickly"][:8]
    clips = [(c, shapes.render(shapes.draw_scene(random, caption=c))) for c in captions]
    return [example.path_of(Video(frames=v.frames[order], fps=v.fps), c.motion) for c, v in clips]


def test_centres_are_the_drawn_ones():
    scene = shapes.draw_scene(np.random.default_rng(1))
    found = example.centres(shapes.render(scene, num_frames=1))
    assert torch.allclose(found, torch.tensor([scene.start]), atol=0.5)


def test_true_motion_is_between_and_half_way():
    rounds = list(example.rounds_of(paths([*range(17)]), 2))
    assert [(r.frames, len(r.new)) for r in rounds] == [(9, 32), (17, 64)]
    for made in rounds:
        assert made.between == made.in_box == 1.0
        assert all(abs(place - 0.5) < 0.2 for place in made.places) and made.places


def test_motion_out_of_order_fails():
    """Every odd frame is taken from another moment."""
    order = [i if i % 2 == 0 else (i + 6) % 16 for i in range(17)]
    finest = list(example.rounds_of(paths(order), 2))[-1]
    assert finest.between < 0.2 and finest.in_box < 0.2


def test_the_demo_model_interpolates(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--num_prompts", "2", "--rounds", "1"])
    example.main()
    said = capsys.readouterr().out
    assert "2 prompts, 9 frames, 256 interpolated tokens each" in said
    assert "round 1: 5 -> 9 frames, 8 new:" in said


@pytest.mark.parametrize(
    ("num_prompts", "least"),
    [(8, 0.85), pytest.param(32, 0.9, marks=[pytest.mark.slow, pytest.mark.campaign])],
    ids=["few", "all"],
)
def test_motion_lies_between_its_neighbours(num_prompts: int, least: float):
    """The demo model, 5 to 33 frames. All 32 prompts give the figure of docs/cogvideo.md."""
    rounds, tokens = example.run("demo", num_prompts, 3)
    assert [made.frames for made in rounds] == [9, 17, 33]
    assert [len(made.new) for made in rounds] == [4 * num_prompts, 8 * num_prompts, 16 * num_prompts]
    assert tokens == (4 + 8 + 16) * 64
    assert example.share_between(rounds) >= least, [made.between for made in rounds]
    assert 0.3 < median(place for made in rounds for place in made.places) < 0.7  # no copies of a neighbour
