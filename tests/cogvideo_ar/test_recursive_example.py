"""The measure of examples/recursive_interpolation.py: true motion passes, motion out of order does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.clips import shapes
from shared.video import Video

FILE = Path(__file__).parents[2] / "examples" / "recursive_interpolation.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recursive_interpolation", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def paths(example: ModuleType, order: list[int]) -> list[Tensor]:
    """Of true clips, their frames in this order."""
    random = np.random.default_rng(3)
    captions = [c for c in shapes.prompts("heldout", 60) if c.speed == "quickly"][:8]
    clips = [(c, shapes.render(shapes.draw_scene(random, caption=c))) for c in captions]
    return [example.path_of(Video(frames=v.frames[order], fps=v.fps), c.motion) for c, v in clips]


def test_centres_are_the_drawn_ones(example: ModuleType):
    scene = shapes.draw_scene(np.random.default_rng(1))
    found = example.centres(shapes.render(scene, num_frames=1))
    assert torch.allclose(found, torch.tensor([scene.start]), atol=0.5)


def test_true_motion_is_between_and_half_way(example: ModuleType):
    rounds = list(example.rounds_of(paths(example, [*range(17)]), 2))
    assert [(r.frames, len(r.new)) for r in rounds] == [(9, 32), (17, 64)]
    for made in rounds:
        assert made.between == made.in_box == 1.0
        assert all(abs(place - 0.5) < 0.2 for place in made.places) and made.places


def test_motion_out_of_order_fails(example: ModuleType):
    """Every odd frame is taken from another moment."""
    order = [i if i % 2 == 0 else (i + 6) % 16 for i in range(17)]
    finest = list(example.rounds_of(paths(example, order), 2))[-1]
    assert finest.between < 0.2 and finest.in_box < 0.2


def test_the_demo_model_interpolates(example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--num_prompts", "2", "--rounds", "1"])
    example.main()
    said = capsys.readouterr().out
    assert "2 prompts, 9 frames, 256 interpolated tokens each" in said
    assert "round 1: 5 -> 9 frames, 8 new:" in said
