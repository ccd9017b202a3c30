"""The slow reference computes what ours computes: only its cost structure is another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.peers import ar
from benchmarks.peers.slow_reference import SlowSampler, slow_generate


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Narrow, with few tokens."""
    config = ar.ours_of("config").TransformerConfig

    def small(**changes: Any) -> Any:
        sizes = {"num_layers": 3, "num_heads": 2, "head_dim": 8, "vocab_size": 250, "num_image_tokens": 40}
        places = {"start_of_image": 245, "pad_token": 41, "grid": (4, 4), "num_positions": 600}
        return config(**sizes, **places, **changes)

    made = small(), small(temporal="window", window=2)
    return tuple(ar.random_model(one, torch.float64) for one in made)


@pytest.mark.parametrize("layout", ["image", "keyframe", "interpolation"])
@pytest.mark.parametrize("guided", [False, True])
def test_it_makes_the_tokens_that_ours_makes(stages: tuple[Any, Any], layout: str, guided: bool) -> None:
    model = stages[layout == "interpolation"]
    kind = getattr(ar.ours_of("layout"), f"{layout}_layout")(model.config, 3)
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(40, (2, kind.num_given, kind.frame_len), generator=random)
    texts = torch.randint(42, 245, (4 if guided else 2, 3), generator=random).tolist()
    alpha = 3.0 if guided else None
    slow = slow_generate(model, kind, texts, frames, lambda x: x.argmax(1), guidance_alpha=alpha)
    ours = ar.ours_of("generation").generate_tokens(
        model, kind, texts, frames, lambda x, _: x.argmax(1), guidance_alpha=alpha, release=True
    )
    assert torch.equal(slow, ours)


def test_its_sampler_draws_from_the_same_distribution() -> None:
    labels, logits = torch.arange(12) % 4, torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    draw = {"temperature": 0.9, "top_k": 2, "temperature2": 0.8}
    wanted = ar.ours_of("sampling").CogLMSampler(labels, **draw).probabilities(logits)[0]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tokens = SlowSampler(labels, **draw)(logits.expand(4000, -1).clone())
    shares = tokens.bincount(minlength=12) / 4000
    assert (shares - wanted).abs().max() < 0.04 and not shares[wanted == 0].any()


def test_a_row_and_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole row at a small size: both sides, the difference, the bytes."""
    original = ar.ours_of("config").cogvideo

    def small() -> Any:
        config = original()
        return replace(config, keyframes=replace(config.keyframes, num_image_tokens=600, pad_token=603))

    monkeypatch.setattr(ar.ours_of("config"), "cogvideo", small)
    monkeypatch.setattr(ar, "SIDE", 4)
    pair = ar.step_pair(torch.float32, 2, 20)
    assert pair.difference is not None and pair.difference() < 1e-5
    assert pair.facts["tokens"] == 2 * ar.STEPS and pair.facts["floor_seconds"] > 0


def test_a_step_reads_the_weights_once_and_all_keys(stages: tuple[Any, Any]) -> None:
    layout = ar.ours_of("layout").keyframe_layout(stages[0].config, 3)
    parameters = sum(p.numel() for p in stages[0].blocks.parameters()) + 40 * 16
    keys = 2 * (3 + 3) + 16  # text and three slots in both channels, and a whole frame over time
    assert ar.step_bytes(stages[0], layout, 2, 19) == 8 * (parameters + 3 * 2 * 2 * keys * 16)


def test_a_whole_video_by_both_ways(monkeypatch: pytest.MonkeyPatch, stages: tuple[Any, Any]) -> None:
    monkeypatch.setattr(ar, "transformers", lambda dtype, side: tuple(one.to(dtype) for one in stages))
    pair = ar.video_pair(torch.float32, 4)
    assert pair.ours().shape == pair.peer().shape == (1, 33, 16)
    assert pair.facts["floor_seconds"] > 0


def test_what_steps_of_several_frames_read(stages: tuple[Any, Any]) -> None:
    """A wave reads the weights once; windows of four slots of all frames before, in either kind of layer."""
    layout = ar.ours_of("layout").interpolation_layout(stages[1].config, 3)
    weights = sum(p.numel() for p in stages[1].blocks.parameters()) + 40 * 16
    one = ar.steps_bytes(stages[1], layout, 1, [((3, 0),)])
    assert one == 8 * (weights + 2 * 16 * (3 * 3 + 2 * (3 + 3 * 4) + (3 + 3 * 1)))  # slot 0 is shifted alone
    two = ar.steps_bytes(stages[1], layout, 1, [((3, 8), (4, 0))])
    assert one < two < 2 * one
    image = ar.ours_of("layout").image_layout(stages[0].config, 3)
    assert ar.steps_bytes(stages[0], image, 1, [((0, 0),)]) < 8 * weights  # the temporal channel is not read
