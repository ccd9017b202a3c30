"""The dependencies of the windowed temporal channel and the earliest schedules, against recorded ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo_ar.config import PRESETS, TransformerConfig
from cogvideo_ar.layout import interpolation_layout, keyframe_layout
from cogvideo_ar.wavefront import generate_tokens_in_waves, last_needed, wavefront_schedule
from tests.parity.cogvideo_ar.stages import build, config_of, folder, special_ids, stage_weights
from tests.parity.recorded import read_json, read_tensors

pytestmark = pytest.mark.parity
FACTS: dict[str, Any] = read_json(folder() / "swin_dependency.json")
LAYOUTS = {
    "four_frames_after_a_given_one": keyframe_layout,
    "two_interpolated_frames": interpolation_layout,
}


def recorded_config(num_layers: int) -> TransformerConfig:
    geometry = FACTS["geometry"]
    assert geometry["shift"] == geometry["window"] // 2
    released = PRESETS["cogvideo"]().interpolation
    return replace(released, num_layers=num_layers, grid=tuple(geometry["grid"]), window=geometry["window"])


@pytest.mark.parametrize("num_layers", [3, 4, 5, 48])
def test_last_slots_needed(num_layers: int) -> None:
    """Recorded for three layers and more; taken layer by layer, some paths over two frames need five."""
    config = recorded_config(num_layers)
    needed = last_needed(config.grid, config.window, num_layers, 3).tolist()
    assert needed[1] == FACTS["last_slot_needed_of_previous_frame"]
    if num_layers >= 5:
        assert needed[2] == FACTS["last_slot_needed_two_frames_back"]
    assert all(a <= b for a, b in zip(needed[2], FACTS["last_slot_needed_two_frames_back"], strict=True))


@pytest.mark.parametrize("num_layers", [3, 48])
@pytest.mark.parametrize("name", FACTS["earliest_schedule"])
def test_earliest_schedule(name: str, num_layers: int) -> None:
    """967 steps instead of 1600, and 589 instead of 800, at the released geometry."""
    config, facts = recorded_config(num_layers), FACTS["earliest_schedule"][name]
    schedule = wavefront_schedule(config, LAYOUTS[name](config, 1))
    got = {
        "tokens": schedule.num_tokens,
        "steps": schedule.num_steps,
        "max_parallel": schedule.max_parallel,
    }
    assert got == facts


def recorded_batches() -> list[str]:
    """Unguided calls of stage 2, the one with the fewest rows first."""
    facts, tensors = (
        read_json(folder() / "inference_cases.json"),
        read_tensors(folder() / "inference_cases.safetensors"),
    )
    names = [name for name, fact in facts.items() if "call" in fact and fact["weights"] == "stage2"]
    return sorted(names, key=lambda name: len(tensors[f"{name}.seq"]))


def test_upstreams_tokens_in_waves() -> None:
    """Greedy tokens of the released code, whose prefill has its oddities, in float64; the smallest case, as
    `test_generation` takes all of them one slot at a time."""
    name = recorded_batches()[0]
    call = read_json(folder() / "inference_cases.json")[name]["call"]
    tensors = read_tensors(folder() / "inference_cases.safetensors")
    sizes = read_json(folder() / "train_cases.json")
    window = max(case["window_size"] for case in sizes["cases"].values())
    start, frame_len = special_ids()["<start_of_image>"], call["frame_len"]
    config = config_of(sizes["config"], window=window, start_of_image=start, frame_len=frame_len)
    model = build(config, stage_weights(2), torch.float64)

    def frames_of(seq: Tensor) -> Tensor:
        return seq[:, call["text_len"] + 1 :].long().unflatten(1, (-1, frame_len))

    seq, layout = tensors[f"{name}.seq"], interpolation_layout(config, call["text_len"])
    out = generate_tokens_in_waves(
        model,
        layout,
        seq[:, : call["text_len"]].tolist(),
        frames_of(seq)[:, : layout.num_given],
        lambda logits, number: logits.argmax(1),
        text_weight=call["log_text_attention_weights"],
        release=True,
    )
    assert torch.equal(out, frames_of(tensors[f"{name}.out"]))
