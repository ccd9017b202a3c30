from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideo_ar.config import PRESETS
from cogvideo_ar.kv_cache import KVCache
from cogvideo_ar.layout import SequenceLayout, frame_slots, interpolation_layout, keyframe_layout
from cogvideo_ar.wavefront import (
    dependencies,
    generate_tokens_in_waves,
    last_needed,
    sequential_steps,
    wavefront_schedule,
)
from tests.cogvideo_ar.tiny import kind_of, tiny_config, visible, wild_model


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "extent"), [("full", None), ("window", None), ("local", (2, 2, 2)), ("local", (3, 1, 2))]
)
def test_dependencies_are_what_changes(num_layers: int, kind: str, extent: tuple[int, int, int]):
    """Every input slot is changed in turn: logits change exactly where the masks say that they may."""
    config = tiny_config(num_layers=num_layers, grid=(4, 2), num_frames=4, **kind_of(kind, extent=extent))
    layout, model = keyframe_layout(config, 1), wild_model(config)
    frames, size = layout.num_frames, layout.frame_len
    slots = frame_slots(torch.zeros(1, frames, size, dtype=torch.long), config.start_of_image)
    tokens = torch.cat([torch.tensor([[30]]), slots], 1).repeat(frames * size + 1, 1)
    for row, slot in enumerate(range(layout.text_len, layout.length)):
        tokens[row, slot] = 5
    with torch.inference_mode():
        logits = model(tokens, layout)
    changed = ((logits[:-1] - logits[-1:]).abs() > 1e-12).any(2).T  # [slot, slot it depends on]
    changed = changed.view(frames, size, frames, size)
    expected = dependencies(config.grid, config.window, num_layers, frames, config.extent)
    for frame in range(frames):
        for earlier in range(frames):
            found = changed[frame, :, earlier]
            wanted = expected[frame - earlier] if earlier <= frame else torch.zeros_like(found)
            assert torch.equal(found, wanted)


def test_schedule_respects_what_is_needed():
    config = tiny_config(grid=(6, 6), temporal="window", window=2)
    for layout in (keyframe_layout(config, 1), interpolation_layout(config, 1)):
        schedule = wavefront_schedule(config, layout)
        step = {place: number for number, wave in enumerate(schedule.waves) for place in wave}
        targets = range(layout.num_given, layout.num_frames)
        assert sorted(step) == [(frame, slot) for frame in targets for slot in range(36)]
        assert schedule.num_tokens == len(step) > schedule.num_steps
        needed = last_needed(config.grid, 2, config.num_layers, len(targets)).tolist()
        for (frame, slot), number in step.items():
            before = [step[frame, slot - 1] + 1] if slot else []
            for back in range(1, frame - layout.num_given + 1):
                before.append(step[frame - back, needed[back][slot]])
            assert number == max([0, *before])  # neither too early nor later than it must be


def test_the_full_channel_allows_next_to_nothing():
    """A frame's first slot, whose token is known, is fed beside the last one of the frame before."""
    config = tiny_config()
    schedule = wavefront_schedule(config, keyframe_layout(config, 1))
    assert schedule.num_steps == schedule.num_tokens - 3
    assert [wave for wave in schedule.waves if len(wave) > 1] == [((i, 15), (i + 1, 0)) for i in (1, 2, 3)]


@pytest.mark.parametrize("extent", [(2, 2, 2), (3, 2, 2), (5, 1, 1), (1, 2, 2)])
def test_local_interpolation_depends_on_what_the_masks_let_through(extent: tuple[int, int, int]):
    """The generated frames of an interpolation stand two apart in time: no path, no dependence."""
    config = tiny_config(num_layers=2, grid=(3, 3), **kind_of("local", extent=extent))
    layout = interpolation_layout(config, 0)
    _, seen = visible(layout, config, 0)
    spatial, _ = visible(layout, config, 0)
    reach = ((seen | spatial).float() @ (seen | spatial).float() > 0).float()
    later, earlier = layout.frame(4), layout.frame(3)
    expected = reach[later, earlier] > 0
    assert torch.equal(dependencies(config.grid, 0, 2, 2, extent, spacing=2)[1], expected)
    assert bool(expected.any()) == (extent[0] > 2)


def test_uneven_frames_have_no_schedule():
    config = tiny_config(**kind_of("window"))
    layout = SequenceLayout(text_len=0, grid=config.grid, frame_times=(0, 1, 3, 4), num_given=1)
    with pytest.raises(ValueError, match="not evenly spaced"):
        wavefront_schedule(config, layout)


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cogvideo.md"


@pytest.mark.parametrize("name", PRESETS)
def test_documented_steps(name: str):
    """The table in docs/cogvideo.md has a row for every preset, with what the schedules say."""
    steps = sequential_steps(PRESETS[name]())
    rounds = [count for stage, count in steps.items() if stage.startswith("round")]
    assert len(set(rounds)) == 1
    cells = [steps["first frame"], steps["key frames"], f"{len(rounds)} x {rounds[0]}", sum(steps.values())]
    row = f"| `{name}` | " + " | ".join(map(str, cells)) + " |"
    assert row in DOCUMENT.read_text(encoding="utf-8"), row


def test_waves_take_as_many_steps_as_scheduled():
    config = tiny_config(grid=(8, 8), num_extra_positions=256, num_positions=80, temporal="window", window=4)
    model, layout = wild_model(config), interpolation_layout(config, 1)
    schedule, steps, numbers = wavefront_schedule(config, layout), [], []
    model.blocks[0].register_forward_hook(lambda *args: steps.append(args[2].shape[1]))

    def sample(logits: Tensor, number: int) -> Tensor:
        numbers.append(number)
        return logits.argmax(1)

    given_frames = torch.zeros(1, layout.num_given, layout.frame_len, dtype=torch.long)
    generate_tokens_in_waves(model, layout, [[30]], given_frames, sample)
    assert steps[1:] == [len(wave) for wave in schedule.waves]  # the first is the prefill
    assert sorted(numbers) == list(range(schedule.num_tokens)) and numbers != sorted(numbers)
    assert schedule.num_steps < schedule.num_tokens


def test_cache_by_place():
    cache = KVCache(1, 1, 2, [3, 4], torch.empty(0))
    one, two = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 2.0)
    cache.put(two, two, 1, region=1)
    cache.put(one, -one, 0, region=1)
    keys, values = cache.first(2, region=1)
    assert keys[0, 0].tolist() == [[1, 1], [2, 2]] and values[0, 0].tolist() == [[-1, -1], [2, 2]]
    with pytest.raises(ValueError, match="cache region of 3 positions cannot hold 4"):
        cache.put(one, one, 3)
