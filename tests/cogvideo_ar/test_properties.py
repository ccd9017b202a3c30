"""What must hold for every kind of temporal channel and every geometry: nothing is seen that must not be,
cached generation gives the training forward's logits, waves and batches give the tokens of one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvideo_ar.attention import FullAttention, region_slots
from cogvideo_ar.config import PRESETS, CogLMConfig, CogVideoConfig, SamplingConfig, TransformerConfig
from cogvideo_ar.generation import build_samplers, generate_tokens
from cogvideo_ar.interpolation import interpolate_round
from cogvideo_ar.keyframes import generate_keyframes
from cogvideo_ar.kv_cache import KVCache, LayerCache
from cogvideo_ar.layout import (
    SequenceLayout,
    frame_slots,
    image_layout,
    interpolation_layout,
    keyframe_layout,
)
from cogvideo_ar.sampling import CogLMSampler, guide
from cogvideo_ar.slot_attention import SlotAttention
from cogvideo_ar.wavefront import generate_tokens_in_waves
from tests.cogvideo_ar.tiny import (
    NUM_IMAGE_TOKENS,
    configs,
    extents,
    grids,
    kind_of,
    tiny_config,
    visible,
    wild_model,
    windows,
)

KINDS = ("full", "window", "local")
LAYOUTS = st.sampled_from([image_layout, keyframe_layout, interpolation_layout])
SAMPLER = CogLMSampler(torch.arange(NUM_IMAGE_TOKENS) % 7, top_k=4)


def quick(max_examples: int) -> settings:
    return settings(max_examples=max_examples, deadline=None)


# ---- visibility: attention over one-hot values shows the weight of every key


def probes(layout: SequenceLayout, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries and keys, values whose mix is the attention weights [B, N, L, L]."""
    q, k = torch.randn(2, rows, 1, layout.length, layout.length, dtype=torch.float64).unbind(0)
    return q, k, torch.eye(layout.length, dtype=torch.float64).expand_as(q)


def empty_cache(layout: SequenceLayout, window: int, layer: int, rows: int) -> LayerCache:
    sizes = [
        layout.text_len + layout.num_frames * len(slots) for slots in region_slots(layout, window, layer)
    ]
    like = torch.empty(0, dtype=torch.float64)
    spatial = KVCache(rows, 1, layout.length, [layout.text_len + layout.frame_len], like)
    return LayerCache(spatial=spatial, temporal=KVCache(rows, 1, layout.length, sizes, like))


def texts_of(text_len: int, padding: int) -> Tensor:
    """Two rows, the second with that much padding: bool [2, T]."""
    valid = torch.ones(2, text_len, dtype=torch.bool)
    valid[1, :padding] = False
    return valid


@pytest.mark.parametrize("kind", KINDS)
@quick(15)
@given(data=st.data(), make=LAYOUTS, text_len=st.integers(1, 3), layer=st.integers(0, 1))
def test_a_sequence_sees_all_that_it_should_and_nothing_else(kind, data, make, text_len, layer):
    config = data.draw(configs(kind))
    layout, valid = make(config, text_len), texts_of(text_len, data.draw(st.integers(0, text_len - 1)))
    q, k, v = probes(layout, rows=2)
    context = FullAttention(
        layout, window=config.window, extent=config.extent, like=q[:, 0], text_valid_BT=valid
    )
    keys = torch.cat([valid, torch.ones(2, layout.length - text_len, dtype=torch.bool)], 1)
    spatial, temporal = (rule & keys[:, None] for rule in visible(layout, config, layer))
    assert torch.equal(context.spatial(q, k, v, None)[:, 0] > 0, spatial)
    if not layout.base_only:
        assert torch.equal(context.temporal(q, k, v, None, layer)[:, 0] > 0, temporal[:, text_len:])


@pytest.mark.parametrize("kind", KINDS)
@quick(15)
@given(data=st.data(), make=LAYOUTS, text_len=st.integers(1, 4), layer=st.integers(0, 1))
def test_a_step_sees_all_that_it_should_and_nothing_else(kind, data, make, text_len, layer):
    """Also with room for less text than there is, as in the released caches: what is beyond is not seen."""
    config = data.draw(configs(kind))
    layout, valid = make(config, text_len), texts_of(text_len, data.draw(st.integers(0, text_len - 1)))
    assume(layout.frame_len >= text_len and not layout.base_only)
    room = data.draw(st.sampled_from([None, 1, 2]))
    q, k, v = probes(layout, rows=2)
    options = {"window": config.window, "extent": config.extent, "like": q[:, 0], "text_valid_BT": valid}
    prefix, cache = layout.prefix(layout.num_given), empty_cache(layout, config.window, layer, 2)
    FullAttention(prefix, **options).spatial(*(x[:, :, : prefix.length] for x in (q, k, v)), cache)
    FullAttention(prefix, **options).temporal(*(x[:, :, : prefix.length] for x in (q, k, v)), cache, layer)
    context = SlotAttention(layout, **options, text_room=room)
    rules = kept(layout, valid, visible(layout, config, layer), room)
    for place in range(prefix.length, layout.length):
        context.aim((divmod(place - text_len, layout.frame_len),))
        here = slice(place, place + 1)
        one = (q[:, :, here], k[:, :, here], v[:, :, here])
        assert torch.equal(context.spatial(*one, cache)[:, 0, 0] > 0, rules[0][:, place])
        assert torch.equal(context.temporal(*one, cache, layer)[:, 0, 0] > 0, rules[1][:, place])


def kept(
    layout: SequenceLayout, valid: Tensor, rules: tuple[Tensor, Tensor], room: int | None
) -> tuple[Tensor, Tensor]:
    """The rules for every row [B, L, L]: without padding, and without what a short cache does not hold.
    Counted from a row's first text token, the spatial cache holds `room` + one frame, the other `room` + all
    frames."""
    seen = []
    for rule, num_slots in zip(rules, (layout.frame_len, layout.num_frames * layout.frame_len), strict=True):
        keys = torch.ones(2, layout.length, dtype=torch.bool)
        for row, length in enumerate(valid.sum(1).tolist()):
            keys[row, : layout.text_len] = valid[row]
            for slot in range(layout.length - layout.text_len):
                inside = room is None or length + slot % num_slots < room + num_slots
                keys[row, layout.text_len + slot] = inside
        seen.append((rule & keys[:, None]) | torch.eye(layout.length, dtype=torch.bool))
    return seen[0], seen[1]


# ---- cached == uncached, and one order of generation == another


def random_given(layout: SequenceLayout, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, layout.num_given, layout.frame_len)
    return torch.randint(0, NUM_IMAGE_TOKENS, shape, generator=generator)


def random_texts(draw: st.DrawFn, rows: int) -> list[list[int]]:
    pieces = st.lists(st.integers(NUM_IMAGE_TOKENS, 39), min_size=1, max_size=8)
    return draw(st.lists(pieces, min_size=rows, max_size=rows))


@st.composite
def runs(draw: st.DrawFn, preset: str):
    """A model of a preset's stage in any size, a layout, texts and given frames, and the options of a
    generation in the sane form."""
    stage = draw(st.sampled_from(["keyframes", "interpolation"]))
    kind = getattr(PRESETS[preset](), stage).temporal
    config, rows = draw(configs(kind)), draw(st.integers(1, 2))
    alpha = draw(st.sampled_from([None, 2.5]))
    texts = random_texts(draw, rows * (1 if alpha is None else 2))
    layout = draw(LAYOUTS)(config, max(map(len, texts)))
    options = {"guidance_alpha": alpha, "text_weight": draw(st.sampled_from([0.0, 1.4]))}
    return wild_model(config), layout, texts, random_given(layout, rows), options


@pytest.mark.parametrize("preset", PRESETS)
@quick(15)
@given(data=st.data())
@torch.inference_mode()
def test_cached_logits_are_those_of_the_whole_sequence(preset, data):
    model, layout, texts, given_frames, options = data.draw(runs(preset))
    seen: list[Tensor] = []

    def sample(logits: Tensor, number: int) -> Tensor:
        seen.append(logits)
        return logits.argmax(1)

    frames = generate_tokens(model, layout, texts, given_frames, sample, **options)
    slots = frame_slots(frames, model.config.start_of_image)
    first, alpha = layout.num_given * layout.frame_len, options["guidance_alpha"]
    rows = []
    for i, text in enumerate(texts):  # alone, and thus without padding
        tokens = torch.cat([torch.tensor([text]), slots[i % len(slots)][None]], 1)
        rows.append(model(tokens, replace(layout, text_len=len(text)), text_weight=options["text_weight"])[0])
    logits = torch.stack(rows)[:, first:]
    if alpha is not None:
        logits = guide(logits[: len(slots)], logits[len(slots) :], alpha)
    torch.testing.assert_close(torch.stack(seen, 1), logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
@quick(15)
@given(data=st.data(), release=st.booleans())
def test_waves_give_the_tokens_of_one_at_a_time(preset, data, release):
    """The same random numbers; the release's oddities change nothing about it."""
    model, layout, texts, given_frames, options = data.draw(runs(preset))
    targets = (layout.num_frames - layout.num_given) * layout.frame_len
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(len(given_frames), targets, 2, generator=generator, dtype=torch.float64)

    def sample(logits: Tensor, number: int) -> Tensor:
        return SAMPLER.sample(logits, uniforms[:, number])

    arguments = (model, layout, texts, given_frames, sample)
    expected = generate_tokens(*arguments, **options, release=release)
    assert torch.equal(generate_tokens_in_waves(*arguments, **options, release=release), expected)


class Characters:
    def encode(self, text: str) -> list[int]:
        return [26 + ord(character) % 14 for character in text]

    def id_of(self, piece: str) -> int:
        return 25


@pytest.mark.parametrize("kind", KINDS)
@quick(10)
@given(data=st.data(), alpha=st.sampled_from([1.0, 2.5]), num_frames=st.sampled_from([3, 5, 9]))
def test_all_gaps_of_a_round_are_filled_as_one_by_one(kind, data, alpha, num_frames):
    config = data.draw(configs(kind).filter(lambda config: config.num_frames == 5))
    prompts = ["ab", "c"]
    sampling = SamplingConfig(interpolation_guidance_alpha=alpha, default=CogLMConfig(top_k=3), max_batch=64)
    generator = torch.Generator().manual_seed(2)
    shape = (len(prompts), num_frames, config.frame_len)
    frames = torch.randint(0, NUM_IMAGE_TOKENS, shape, generator=generator)
    model, samplers = wild_model(config), build_samplers(sampling, torch.arange(NUM_IMAGE_TOKENS) % 7)
    videos = [
        interpolate_round(
            model,
            Characters(),
            prompts,
            replace(sampling, max_batch=size),
            samplers,
            [torch.Generator().manual_seed(i) for i in range(len(prompts))],
            frames,
            duration=2.0,
        )
        for size in (64, 1)
    ]
    assert torch.equal(videos[0], videos[1]) and torch.equal(videos[0][:, ::2], frames)


# ---- the presets' whole videos, in any size


@st.composite
def reshaped(draw: st.DrawFn, preset: CogVideoConfig) -> tuple[TransformerConfig, TransformerConfig]:
    """Both stages with the preset's kinds of channels, over one drawn frame size."""
    stages = preset.keyframes, preset.interpolation
    window = draw(windows()) if any(stage.temporal == "window" for stage in stages) else 0
    sizes = {"grid": draw(grids(window)), "num_layers": draw(st.integers(1, 3)), "image_position_offset": 20}
    first, second = (
        tiny_config(**sizes, num_frames=num_frames, **kind_of(stage.temporal, window=window, extent=extent))
        for stage, num_frames, extent in zip(
            stages, (draw(st.sampled_from([3, 5])), 5), (draw(extents()), draw(extents())), strict=True
        )
    )
    return first, second


@pytest.mark.parametrize("name", PRESETS)
@quick(12)
@given(data=st.data(), prompts=st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=2))
def test_a_presets_video_does_not_depend_on_how_it_is_scheduled(name, data, prompts):
    """Key frames and a round, sampled in the sane form: together, and one slot and one gap at a time."""
    preset: CogVideoConfig = PRESETS[name]()
    sampling = replace(preset.sampling, compat="exact", default=CogLMConfig(top_k=3), max_batch=64)
    samplers = build_samplers(sampling, torch.arange(NUM_IMAGE_TOKENS) % 7)
    stage1, stage2 = (wild_model(part) for part in data.draw(reshaped(preset)))
    first = torch.zeros(len(prompts), 1, stage1.config.frame_len, dtype=torch.long)

    def video(config: SamplingConfig) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        arguments = (Characters(), prompts, config, samplers, generators)
        frames = generate_keyframes(stage1, *arguments, first)
        return interpolate_round(stage2, *arguments, frames, duration=2.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cogvideo_ar.keyframes.generate_tokens_in_waves", generate_tokens)
        patch.setattr("cogvideo_ar.interpolation.generate_tokens_in_waves", generate_tokens)
        expected = video(replace(sampling, max_batch=1))
    assert torch.equal(video(sampling), expected)
