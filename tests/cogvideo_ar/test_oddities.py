"""The release's oddities, one at a time: each does what docs/quirks.md says and as much as its table says."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideo_ar.config import RELEASED, RELEASED_TEXT_ROOM, SANE, Oddities
from cogvideo_ar.generation import generate_tokens
from cogvideo_ar.layout import (
    SequenceLayout,
    frame_slots,
    interpolation_layout,
    keyframe_layout,
    offset_slots,
)
from cogvideo_ar.sampling import guide
from cogvideo_ar.transformer import CogVideoTransformer
from tests.cogvideo_ar.tiny import kind_of, tiny_config, wild_model

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "quirks.md"
NUM_IMAGE_TOKENS, ALPHA = 512, 3.0


@cache
def model_of(temporal: str) -> CogVideoTransformer:
    """Random weights in float64, so drawn that attention is neither flat nor all on one key; 8 x 8 slots a
    frame, windows of 4."""
    generator = torch.Generator().manual_seed(0)
    model = CogVideoTransformer(
        tiny_config(
            num_layers=4,
            num_heads=4,
            head_dim=8,
            vocab_size=600,
            num_image_tokens=NUM_IMAGE_TOKENS,
            start_of_image=590,
            pad_token=591,
            num_positions=256,
            num_extra_positions=256,
            image_position_offset=100,
            grid=(8, 8),
            **kind_of(temporal, window=4),
        )
    )
    with torch.no_grad():
        for name, parameter in model.double().eval().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2:
                parameter.copy_(noise * (0.5 if "embeddings" in name else 1.5 / parameter.shape[1] ** 0.5))
            else:
                parameter.copy_(noise * 0.3 + float(name.endswith("norm.weight")))
    return model


def random_ids(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(3))


def text_of(length: int) -> Tensor:
    return random_ids(NUM_IMAGE_TOKENS, 590, 1, length)


@torch.inference_mode()
def forced_logits(
    model: CogVideoTransformer,
    layout: SequenceLayout,
    given_BL: Tensor | None = None,
    *,
    weight: float = 0.0,
    oddities: Oddities = SANE,
) -> Tensor:
    """Cached logits of all generated slots [slots, V], always behind the same tokens; `given_BL` replaces the
    given frames' slots."""
    frames = random_ids(0, NUM_IMAGE_TOKENS, 1, layout.num_frames, layout.frame_len)
    slots = frame_slots(frames, model.config.start_of_image)
    num_given = layout.num_given * layout.frame_len
    given = slots[:, :num_given] if given_BL is None else given_BL
    state = model.start(text_of(layout.text_len), given, layout, text_weight=weight, oddities=oddities)
    return torch.cat([model.step(token, state) for token in slots[:, num_given:].unbind(1)])


def without_and_with(oddity: str) -> tuple[Tensor, Tensor]:
    """Logits in the sane form, and with this oddity where it matters."""
    switched, stage2 = Oddities(**{oddity: True}), model_of("window")
    if oddity == "interpolation_guider_offset":
        layouts = [interpolation_layout(stage2.config, length) for length in (14, 6)]
        cond, guider = (forced_logits(stage2, layout) for layout in layouts)
        frames = random_ids(0, NUM_IMAGE_TOKENS, 1, 5, layouts[0].frame_len)[:, :3]
        late = offset_slots(frames, torch.tensor([14 - 6]), stage2.config.start_of_image)
        odd = forced_logits(stage2, layouts[1], late, oddities=switched)
        return guide(cond, guider, ALPHA), guide(cond, odd, ALPHA)
    if oddity == "short_text_cache":
        model, weight = model_of("full"), 0.0
        layout = keyframe_layout(model.config, RELEASED_TEXT_ROOM + 16)
    else:
        model, weight = stage2, 1.4 if oddity == "temporal_text_bias_decode_only" else 0.0
        layout = interpolation_layout(model.config, 14)
    return (
        forced_logits(model, layout, weight=weight),
        forced_logits(model, layout, weight=weight, oddities=switched),
    )


def effect(oddity: str) -> tuple[float, float, float]:
    """Mean and largest difference of the logits in their standard deviations, and the share of slots whose
    likeliest token changes, in percent."""
    sane, odd = without_and_with(oddity)
    difference = (odd - sane).abs() / sane.std()
    changed = (odd.argmax(1) != sane.argmax(1)).double().mean()
    return difference.mean().item(), difference.max().item(), 100 * changed.item()


@pytest.mark.parametrize("oddity", Oddities.__dataclass_fields__)
def test_documented_effect(oddity: str):
    mean, largest, changed = effect(oddity)
    row = f"| `{oddity}` effect | {mean:.2f} | {largest:.1f} | {changed:.0f} % |"
    assert row in DOCUMENT.read_text(encoding="utf-8"), row
    assert changed > 0


@torch.inference_mode()
def test_quirk_interpolation_guider_offset():
    """The guider's given frames begin late by the difference of the texts; the first slots carry no word."""
    frames = torch.arange(1, 13).view(1, 3, 4)
    assert offset_slots(frames, torch.tensor([2]), 99).tolist() == [[99, -1, -1, 1, 99, 3, 4, 5, 99, 7, 8, 9]]
    assert torch.equal(offset_slots(frames, torch.tensor([0]), 99), frame_slots(frames, 99))
    model = wild_model(tiny_config(**kind_of("window")))
    layout, given = interpolation_layout(model.config, 3), random_ids(0, 23, 1, 3, 16)

    def logits(texts: list[list[int]], release: bool) -> Tensor:
        seen: list[Tensor] = []

        def sample(logits_BV: Tensor, number: int) -> Tensor:
            seen.append(logits_BV)
            return torch.zeros(1, dtype=torch.long)  # the same tokens everywhere

        generate_tokens(model, layout, texts, given, sample, guidance_alpha=ALPHA, release=release)
        return torch.cat(seen)

    def rows(text: list[int], given_BL: Tensor) -> Tensor:
        layout = interpolation_layout(model.config, len(text))
        state = model.start(torch.tensor([text]), given_BL, layout, oddities=RELEASED)
        start = torch.tensor([24])
        zero = torch.zeros_like(start)
        return torch.cat([model.step(zero if i % 16 else start, state) for i in range(32)])

    cond, guider = [30, 31, 32], [33]
    expected = guide(
        rows(cond, frame_slots(given, 24)), rows(guider, offset_slots(given, torch.tensor([2]), 24)), ALPHA
    )
    torch.testing.assert_close(logits([cond, guider], release=True), expected)
    expected = guide(
        rows(cond, frame_slots(given, 24)), rows([33, 34, 35, 36], frame_slots(given, 24)), ALPHA
    )
    layout = interpolation_layout(model.config, 4)  # a longer guider: the release fails, and nothing is moved
    torch.testing.assert_close(logits([cond, [33, 34, 35, 36]], release=True), expected)


@torch.inference_mode()
def test_quirk_short_text_cache():
    """With two tokens too many a frame's last slot misses the one before it; with one, nothing is missed."""
    model = model_of("full")
    for excess, changed in ((0, []), (1, []), (2, [True])):
        layout = keyframe_layout(model.config, RELEASED_TEXT_ROOM + excess)
        sane, odd = (
            forced_logits(model, layout, oddities=Oddities(short_text_cache=on)) for on in (False, True)
        )
        differs = (sane != odd).any(1)
        first = layout.frame_len - 1
        assert not bool(differs[:first].any())
        assert differs[first : first + len(changed)].tolist() == changed
        assert bool(differs.any()) == bool(changed)
