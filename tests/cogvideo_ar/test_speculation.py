"""Guesses change no token, in float64; they save steps where frames resemble each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvideo_ar import speculation
from cogvideo_ar.generation import generate_tokens
from cogvideo_ar.layout import interpolation_layout, keyframe_layout
from cogvideo_ar.sampling import CogLMSampler
from cogvideo_ar.speculation import generate_tokens_with_guesses
from cogvideo_ar.transformer import CogVideoTransformer
from tests.cogvideo_ar.tiny import NUM_IMAGE_TOKENS, configs, tiny_config, wild_model

SAMPLER = CogLMSampler(torch.arange(NUM_IMAGE_TOKENS) % 5, top_k=3)


class Run:
    """Tokens, the numbers that were drawn, and the slots of every step."""

    def __init__(
        self, generate: Any, model: CogVideoTransformer, layout: Any, likeness: float, **options: Any
    ):
        self.numbers: list[int] = []
        self.sizes: list[int] = []
        self.steps: list[int] = []
        random = torch.Generator().manual_seed(1)
        frames = torch.randint(NUM_IMAGE_TOKENS, (1, layout.num_given, layout.frame_len), generator=random)
        uniforms = torch.rand(layout.length, 1, 2, generator=random, dtype=torch.float64)
        repeat = torch.rand(layout.length, generator=random) < likeness

        def sample(logits: Tensor, number: int) -> Tensor:
            """Sometimes the token of the last given frame, as a model would that likes it."""
            numbers = range(number, number + len(logits))  # they follow one another
            self.numbers += numbers
            self.sizes.append(len(numbers))
            drawn = SAMPLER.sample(logits, uniforms[number : numbers.stop, 0])
            places = torch.tensor([number % layout.frame_len for number in numbers])
            return frames[0, -1, places].where(repeat[number : numbers.stop], drawn)

        handle = model.blocks[0].register_forward_hook(lambda *args: self.steps.append(args[2].shape[1]))
        groups = 2 if "guidance_alpha" in options else 1
        texts = [[30 + i] * layout.text_len for i in range(groups)]
        self.tokens = generate(model, layout, texts, frames, sample, **options)
        handle.remove()


@settings(max_examples=15, deadline=None)
@given(
    config=configs(),
    make=st.sampled_from([keyframe_layout, interpolation_layout]),
    likeness=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    options=st.sampled_from([{}, {"guidance_alpha": 3.0}, {"text_weight": 1.4}, {"release": True}]),
)
def test_tokens_are_those_of_one_slot_at_a_time(
    config: Any, make: Any, likeness: float, options: dict[str, Any]
) -> None:
    layout, model = make(config, 2), wild_model(config)
    serial = Run(generate_tokens, model, layout, likeness, **options)
    guessed = Run(generate_tokens_with_guesses, model, layout, likeness, **options)
    assert torch.equal(serial.tokens, guessed.tokens)
    assert serial.numbers == guessed.numbers  # every token is drawn once, in its turn
    assert len(guessed.steps) <= len(serial.steps)


@settings(max_examples=10, deadline=None)
@given(
    config=configs(),
    likeness=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    options=st.sampled_from([{}, {"guidance_alpha": 3.0}]),
)
def test_places_that_are_drawn_together(config: Any, likeness: float, options: dict[str, Any]) -> None:
    """As on a device: one draw a step, and the tokens and what is counted are the same."""
    layout, model = keyframe_layout(config, 2), wild_model(config)
    counted: list[int] = []
    one_by_one = Run(generate_tokens_with_guesses, model, layout, likeness, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "ONE_BY_ONE", ())
        together = Run(generate_tokens_with_guesses, model, layout, likeness, count=counted.append, **options)
    assert torch.equal(one_by_one.tokens, together.tokens) and one_by_one.steps == together.steps
    assert together.sizes == together.steps[1:] and set(one_by_one.sizes) == {1}  # the first is the prefill
    assert sum(counted) == len(one_by_one.numbers) and len(counted) == len(together.sizes)


def test_frames_that_repeat_take_few_steps() -> None:
    """Sixteen slots a frame: 2 + 3 + 4 + 5 + 2 of them, one guess more in every step."""
    config = tiny_config()
    layout, model = keyframe_layout(config, 2), wild_model(config)
    assert Run(generate_tokens_with_guesses, model, layout, 1.0).steps[1:] == [2, 3, 4, 5, 2] * 4


def test_wrong_guesses_end_the_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "LEAST_RIGHT", 1.1)
    layout, model = keyframe_layout(tiny_config(), 2), wild_model(tiny_config())
    steps = Run(generate_tokens_with_guesses, model, layout, 0.5).steps[1:]
    assert max(steps) > 1 and steps[-48:] == [1] * 48


def test_a_frame_whose_first_guesses_are_wrong_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "LEAST_RIGHT", 1.1)
    monkeypatch.setattr(speculation, "FEWEST_GUESSES", 3)
    layout, model = keyframe_layout(tiny_config(), 2), wild_model(tiny_config())
    steps = Run(generate_tokens_with_guesses, model, layout, 0.0).steps[1:]
    assert steps[0] > 1 and steps[3:] == [1] * (len(steps) - 3)


def test_refusals() -> None:
    config = tiny_config()
    layout, model = keyframe_layout(config, 1), wild_model(config)
    frames = torch.zeros(2, 1, 16, dtype=torch.long)
    for given_frames in (frames, frames[:1, :0]):
        with pytest.raises(ValueError, match="one sample and a given frame"):
            generate_tokens_with_guesses(
                model, layout, [[30]] * len(given_frames), given_frames, lambda x, _: x.argmax(1)
            )
