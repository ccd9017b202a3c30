from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cogvideo_ar import layout
from cogvideo_ar.config import CogLMConfig, PromptTemplates, SamplingConfig
from cogvideo_ar.generation import GreedySampler, StageSamplers, build_samplers, generate_tokens
from cogvideo_ar.interpolation import cut_blocks, interpolate, merge_blocks
from cogvideo_ar.keyframes import generate_first_frames, generate_keyframes
from cogvideo_ar.layout import frame_slots, image_layout, keyframe_layout
from shared.errors import SettingError
from tests.cogvideo_ar.tiny import NUM_IMAGE_TOKENS, tiny_config, wild_model

PROMPTS = PromptTemplates(
    first_frame="{prompt}",
    keyframes="4<n>{prompt}",
    keyframes_guided="4<n>{prompt}v",
    keyframes_guider="4<n>v",
    interpolation="2<n>{prompt}",
)
SAMPLING = SamplingConfig(
    first_frame=CogLMConfig(top_k=3), interpolation_durations=(2.0,), prompts=PROMPTS, max_batch=3
)
LABELS = torch.arange(NUM_IMAGE_TOKENS) % 7


class Characters:
    def encode(self, text: str) -> list[int]:
        return [26 + ord(character) % 14 for character in text]

    def id_of(self, piece: str) -> int:
        return 25


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def video(prompts: list[str], seeds: list[int], config: SamplingConfig) -> Tensor:
    """Both stages, sampled, in float64."""
    stage1 = wild_model(tiny_config(num_layers=2))
    stage2 = wild_model(tiny_config(num_layers=2, temporal="window", window=2), seed=1)
    arguments = (Characters(), prompts, config, build_samplers(config, LABELS), generators(*seeds))
    first = generate_first_frames(stage1, *arguments)
    frames = generate_keyframes(stage1, *arguments, first)
    assert torch.equal(frames[:, :1], first)
    longer = interpolate(stage2, *arguments, frames)
    assert torch.equal(longer[:, ::2], frames)
    return longer


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_a_sample_does_not_depend_on_its_batch(alpha: float):
    config = replace(SAMPLING, guidance_alpha=alpha)
    both = video(["ab", "c"], [5, 6], config)
    assert both.shape == (2, 9, 16)
    assert int(both.min()) >= 0 and int(both.max()) < NUM_IMAGE_TOKENS
    assert torch.equal(video(["c"], [6], config), both[1:])
    assert torch.equal(video(["ab", "c"], [5, 6], replace(config, max_batch=8)), both)
    assert not torch.equal(video(["c"], [7], config), both[1:])


@torch.inference_mode()
def test_guided_logits_are_those_of_two_runs():
    model = wild_model(tiny_config())
    texts, given = [[30, 31, 32], [33]], torch.zeros(1, 1, 16, dtype=torch.long)
    seen: list[Tensor] = []

    def sample(logits: Tensor, number: int) -> Tensor:
        seen.append(logits)
        return logits.argmax(1)

    frames = generate_tokens(
        model, keyframe_layout(model.config, 3), texts, given, sample, guidance_alpha=2.5
    )
    slots = frame_slots(frames, model.config.start_of_image)
    cond, uncond = (
        model(torch.cat([torch.tensor([text]), slots], 1), keyframe_layout(model.config, len(text)))
        for text in texts
    )
    expected = (uncond + (cond - uncond) * 2.5)[0, 16:]
    torch.testing.assert_close(torch.cat(seen), expected)


class Recorder:
    """A sampler that counts its draws."""

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, logits_BV: Tensor, randomness: Tensor) -> Tensor:
        self.calls += 1
        return logits_BV.argmax(1)


@pytest.mark.parametrize(("compat", "expected"), [("release", (15, 1)), ("exact", (16, 0))])
def test_quirk_first_frame_last_token(compat: str, expected: tuple[int, int]):
    config, samplers = (
        replace(SAMPLING, compat=compat),
        StageSamplers(first_frame=Recorder(), default=Recorder()),
    )
    generate_first_frames(wild_model(tiny_config()), Characters(), ["a"], config, samplers, generators(0))
    assert (samplers.first_frame.calls, samplers.default.calls) == expected


def test_prompt_too_long():
    samplers = StageSamplers(first_frame=GreedySampler(), default=GreedySampler())
    with pytest.raises(SettingError, match="text has 12 tokens, at most 10 fit"):
        generate_first_frames(
            wild_model(tiny_config()), Characters(), ["a" * 12], SAMPLING, samplers, generators(0)
        )


def test_every_sample_needs_its_texts():
    model = wild_model(tiny_config())
    nothing = torch.empty(2, 0, 16, dtype=torch.long)
    with pytest.raises(ValueError, match="expected 2 texts for 2 samples, got 1"):
        generate_tokens(
            model, image_layout(model.config, 1), [[30]], nothing, lambda logits, _: logits.argmax(1)
        )


def test_blocks_share_their_borders():
    frames = torch.arange(9)[None, :, None]
    blocks = cut_blocks(frames, 3)
    assert blocks[0, :, :, 0].tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]
    assert torch.equal(merge_blocks(blocks), frames)
    with pytest.raises(ValueError, match="8 frames cannot be cut into blocks of 3"):
        cut_blocks(frames[:, :8], 3)


@pytest.mark.parametrize("at_once", [1, 60, 4096])
def test_rows_that_enter_the_caches_one_after_the_other_see_nothing_else(
    at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """Rows of different texts, some padded, in passes of one, of a few and of all of them."""
    config = replace(SAMPLING, guidance_alpha=3.0, interpolation_guidance_alpha=2.0)
    whole = video(["ab", "cdef"], [5, 6], config)
    monkeypatch.setattr(layout, "PREFILL_TOKENS", at_once)
    assert torch.equal(video(["ab", "cdef"], [5, 6], config), whole)
