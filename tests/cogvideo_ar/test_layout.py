from __future__ import annotations

import pytest
import torch

from cogvideo_ar.layout import (
    SequenceLayout,
    frame_slots,
    image_layout,
    interpolation_layout,
    keyframe_layout,
    pad_text,
    prompt_tokens,
    region_ids,
    text_positions,
    training_batch,
    window_slots,
)
from shared.errors import SettingError
from tests.cogvideo_ar.tiny import tiny_config


def test_slices_cover_the_sequence():
    layout = keyframe_layout(tiny_config(), 3)
    pieces = [slice(0, 3), *(layout.frame(i) for i in range(5))]
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(layout.length))
    assert layout.frames == slice(3, 3 + 5 * 16)


def test_positions_follow_display_time():
    config = tiny_config()
    starts = interpolation_layout(config, 3).slot_positions().unflatten(0, (5, -1))[:, 0]
    assert starts.tolist() == [10, 42, 74, 26, 58]
    assert keyframe_layout(config, 3).slot_positions().tolist() == list(range(10, 90))


def test_orders_undo_each_other():
    layout = interpolation_layout(tiny_config(), 0)
    frames = torch.arange(5)[None, :, None].expand(2, 5, 16)
    assert layout.to_sequence(frames)[0, :, 0].tolist() == [0, 2, 4, 1, 3]
    assert torch.equal(layout.to_display(layout.to_sequence(frames)), frames)


def test_prefix_keeps_the_rule():
    layout = interpolation_layout(tiny_config(), 2)
    assert layout.prefix(3).num_bidirectional == 3
    assert layout.prefix(0).length == 2


def test_text_must_fit():
    with pytest.raises(SettingError, match="11 tokens, at most 10 fit"):
        keyframe_layout(tiny_config(), 11)
    with pytest.raises(ValueError, match="outside"):
        SequenceLayout(text_len=1, grid=(2, 2), frame_times=(0,), num_given=2)


def test_padding_is_on_the_left():
    ids, valid = pad_text([[7, 8, 9], [5]], pad_token=0)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert valid.tolist() == [[True] * 3, [False, False, True]]
    assert text_positions(valid).tolist() == [[0, 1, 2], [0, 0, 0]]
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        pad_text([[7, 8, 9]], pad_token=0, length=2)


def test_last_token_of_a_frame_is_no_input():
    frames = torch.arange(8).view(1, 2, 4)
    assert frame_slots(frames, 99).tolist() == [[99, 0, 1, 2, 99, 4, 5, 6]]


@pytest.mark.parametrize(
    ("make", "targets"),
    [(image_layout, [0]), (keyframe_layout, [1, 2, 3, 4]), (interpolation_layout, [1, 3])],
)
def test_training_batch(make, targets):
    config = tiny_config()
    layout = make(config, 2)
    frames = torch.arange(layout.num_frames)[None, :, None].expand(2, -1, 16)
    text = torch.full((2, 2), 30)
    batch = training_batch(layout, text, frames, start_of_image=24)
    shown = layout.to_display(batch.loss_mask)[0, :, 0].nonzero().flatten().tolist()
    assert shown == targets
    assert batch.tokens.shape == (2, layout.length)
    for i, time in enumerate(layout.frame_times):
        assert batch.tokens[0, layout.frame(i)].tolist() == [24] + [time] * 15
        assert batch.labels[0, i].unique().tolist() == [time]
    with pytest.raises(ValueError, match="do not fit"):
        training_batch(layout, text, frames[:, :, 1:], start_of_image=24)


def test_shifted_regions_on_the_released_grid():
    """Rows and columns fall into [0, 5), [5, 15), [15, 20)."""
    ids = region_ids((20, 20), 10, True).view(20, 20)
    assert ids[:, 0].tolist() == [0] * 5 + [3] * 10 + [6] * 5
    assert ids[0].tolist() == [0] * 5 + [1] * 10 + [2] * 5


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (6, 4)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_partition_the_frame(grid: tuple[int, int], shifted: bool):
    slots, regions = window_slots(grid, 2, shifted), region_ids(grid, 2, shifted)
    assert slots.flatten().sort().values.tolist() == list(range(grid[0] * grid[1]))
    for region in range(int(regions.max()) + 1):
        inside = [bool((regions[window] == region).any()) for window in slots]
        assert sum(inside) == 1  # a region never spreads over two cyclic windows
        assert int((regions == region).sum()) in (1, 2, 4) if shifted else (4,)


class Characters:
    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def id_of(self, piece: str) -> int:
        assert piece == "<n>"
        return -1


def test_prompt_tokens():
    ids = prompt_tokens("{duration}s<n>{prompt}", Characters(), prompt="a<n>{duration}", duration=4)
    assert ids == [*map(ord, "4.0s"), -1, *map(ord, "a<n>{duration}")]
    assert prompt_tokens("{prompt}", Characters(), prompt="") == []
