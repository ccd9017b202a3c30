"""Metrics of videos whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.metrics import (
    METRICS,
    RefusedError,
    motion,
    prompt_accuracy,
    reconstruction,
    temporal_consistency,
)
from benchmarks.metrics.cost import stages, top_level
from shared.clips import shapes
from shared.video import Video

PROMPT = "a red circle moving left quickly on a gray background"


def clip(prompt: str = PROMPT, seed: int = 0, num_frames: int = shapes.NUM_FRAMES) -> Video:
    caption = shapes.Caption(**{"speed": None, **shapes.parse(prompt)})
    return shapes.render(
        shapes.draw_scene(np.random.default_rng(seed), caption=caption), num_frames=num_frames
    )


def gray(levels: list[int], size: int = 16) -> Video:
    frames = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, size, size, 3)
    return Video(frames=frames.contiguous(), fps=8.0)


@pytest.mark.parametrize("caption", shapes.prompts("heldout", 12, seed=5), ids=lambda c: c.text)
def test_ground_truth_is_accurate(caption: shapes.Caption) -> None:
    values = prompt_accuracy.measure(clip(caption.text), caption.text)
    assert set(values.values()) == {1.0}
    assert f"{prompt_accuracy.NAME}/speed" in values or caption.motion == "still"


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        ("a blue circle moving left quickly on a gray background", "colour"),
        ("a red square moving left quickly on a gray background", "shape"),
        ("a red circle moving up quickly on a gray background", "motion"),
        ("a red circle moving left slowly on a gray background", "speed"),
        ("a red circle moving left quickly on a black background", "background"),
    ],
)
def test_one_wrong_attribute_is_found_and_spoils_the_whole(shown: str, wrong: str) -> None:
    values = prompt_accuracy.measure(clip(shown), PROMPT)
    assert [name for name, value in values.items() if value == 0.0] == [
        "prompt_accuracy",
        f"prompt_accuracy/{wrong}",
    ]


def test_only_what_the_prompt_names_is_asked_for() -> None:
    values = prompt_accuracy.measure(clip(), "a circle that moves somehow, red")
    assert values.keys() == {
        "prompt_accuracy",
        *(f"prompt_accuracy/{n}" for n in ("colour", "shape", "valid")),
    }
    assert values["prompt_accuracy"] == 1.0


def test_an_empty_video_is_not_valid() -> None:
    values = prompt_accuracy.measure(gray([128] * 17, 64), PROMPT)
    assert values["prompt_accuracy"] == values["prompt_accuracy/valid"] == 0.0
    assert values["prompt_accuracy/background"] == 1.0


def test_prompt_accuracy_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(RefusedError, match="names none of the oracle's shapes"):
        prompt_accuracy.measure(clip(), "a red car on a gray background")
    with pytest.raises(RefusedError, match="8 frames per second, not 16"):
        prompt_accuracy.measure(Video(frames=clip().frames, fps=16.0), PROMPT)
    with pytest.raises(RefusedError, match="single frame"):
        prompt_accuracy.measure(clip(num_frames=1), PROMPT)


def test_temporal_metrics_of_a_frozen_video() -> None:
    values = temporal_consistency.measure(gray([40] * 5))
    assert values["temporal_consistency"] == pytest.approx(1.0)
    assert values["temporal_consistency/psnr"] == temporal_consistency.MAX_PSNR
    assert values["temporal_consistency/flicker"] == 0.0


def test_temporal_metrics_by_hand() -> None:
    values = temporal_consistency.measure(gray([10, 20, 10, 20]))
    assert values["temporal_consistency/flicker"] == pytest.approx(20.0)
    assert values["temporal_consistency/psnr"] == pytest.approx(20 * math.log10(255 / 10))
    assert temporal_consistency.measure(gray([0, 10, 20, 30]))["temporal_consistency/flicker"] == 0.0


def test_cosine_of_black_frames() -> None:
    assert temporal_consistency.measure(gray([0, 0, 0]))["temporal_consistency"] == 1.0
    assert temporal_consistency.measure(gray([0, 90, 0]))["temporal_consistency"] == 0.0


def test_temporal_metrics_need_three_frames() -> None:
    with pytest.raises(RefusedError, match="three frames"):
        temporal_consistency.measure(gray([1, 2]))


def test_speed_of_ground_truth_lies_in_its_range() -> None:
    values = motion.measure(clip(), PROMPT)
    low, high = motion.RANGES["quickly"]
    assert low - 0.5 <= values["motion/speed"] <= high + 0.5
    assert values["motion/speed_error"] < 0.5


def test_speed_error_of_a_clip_that_should_stand_still() -> None:
    values = motion.measure(clip(), "a red circle standing still on a gray background")
    assert values["motion/speed_error"] == pytest.approx(values["motion/speed"] - motion.RANGES["still"][1])
    assert motion.measure(gray([128] * 17, 64), PROMPT) == {}


def test_identical_reconstruction() -> None:
    values = reconstruction.measure(clip(), clip(), PROMPT)
    assert values["reconstruction/psnr"] == reconstruction.MAX_PSNR
    assert values["reconstruction/ssim"] == pytest.approx(1.0)
    assert values["reconstruction/prompt_accuracy"] == 1.0


def test_psnr_and_ssim_by_hand() -> None:
    first, second = gray([100] * 3), gray([110] * 3)
    values = reconstruction.measure(second, first, PROMPT)
    assert values["reconstruction/psnr"] == pytest.approx(20 * math.log10(255 / 10))
    a, b, c1 = 100 / 255, 110 / 255, 0.01**2
    assert values["reconstruction/ssim"] == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_falls_with_noise() -> None:
    truth = clip()
    noise = torch.randint(-30, 31, truth.frames.shape)
    noisy = Video(frames=(truth.frames.int() + noise).clamp(0, 255).byte(), fps=8.0)
    assert reconstruction.measure(noisy, truth, PROMPT)["reconstruction/ssim"] < 0.6


def test_reconstruction_of_another_length_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"\[16, 64, 64, 3\] for a clip of \[17, 64, 64, 3\]"):
        reconstruction.measure(clip(num_frames=16), clip(), PROMPT)


def test_ssim_needs_its_window() -> None:
    with pytest.raises(RefusedError, match="11 pixels"):
        reconstruction.measure(gray([1] * 3, 8), gray([1] * 3, 8), PROMPT)


def test_stages_add_up() -> None:
    run = {"seconds": 2.0, "peak_bytes": 5, "units": 10, "unit": "step"}
    sidecars = [{"stages": {"model": run, "model/late": run}}, {"stages": {"model": {**run, "seconds": 3.0}}}]
    summed = stages(sidecars)
    assert summed["model"]["seconds"] == 2.5 and summed["model"]["units_per_second"] == 4.0
    assert summed["model/late"]["n"] == 1
    assert top_level(["text", "model", "model/late", "other/part"]) == ["text", "model", "other/part"]


def test_recipes_are_distinct_and_change_with_their_content() -> None:
    from dataclasses import replace

    assert len({metric.recipe_id for metric in METRICS.values()}) == len(METRICS)
    metric = METRICS["prompt_accuracy"]
    assert replace(metric, version=2).recipe_id != metric.recipe_id == replace(metric).recipe_id
