"""Small geometries of the real classes, for the transformer's tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cogvideo_ar.config import TransformerConfig
from cogvideo_ar.layout import SequenceLayout
from cogvideo_ar.transformer import CogVideoTransformer

NUM_IMAGE_TOKENS = 23
MOST_TOKENS = 25  # of a drawn frame: more take too long


def tiny_config(**changes: Any) -> TransformerConfig:
    """4 x 4 tokens per frame, 5 frames; `changes` replace single settings."""
    settings: dict[str, Any] = {
        "num_layers": 3,
        "num_heads": 2,
        "head_dim": 4,
        "vocab_size": 40,
        "num_image_tokens": NUM_IMAGE_TOKENS,
        "start_of_image": 24,
        "pad_token": 25,
        "max_text_len": 8,
        "num_positions": 64,
        "num_extra_positions": 200,
        "image_position_offset": 10,
        "grid": (4, 4),
    }
    return TransformerConfig(**settings | changes)


def wild_model(config: TransformerConfig, seed: int = 0) -> CogVideoTransformer:
    """Float64 weights so wide that any change of visibility shows."""
    generator = torch.Generator().manual_seed(seed)
    model = CogVideoTransformer(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.5 + (0.0 if parameter.ndim > 1 else 0.3))
    return model


def kind_of(temporal: str, *, window: int = 2, extent: tuple[int, int, int] = (2, 2, 2)) -> dict[str, Any]:
    """Settings of a kind of temporal channel."""
    settings: dict[str, Any] = {"temporal": temporal}
    if temporal == "window":
        settings["window"] = window
    if temporal == "local":
        settings["extent"] = extent
    return settings


@st.composite
def configs(draw: st.DrawFn, temporal: str | None = None) -> TransformerConfig:
    """Every kind of temporal channel, or this one, over small, not always square, grids."""
    temporal = temporal or draw(st.sampled_from(["full", "window", "local"]))
    window = draw(windows()) if temporal == "window" else 0
    return tiny_config(
        num_layers=draw(st.integers(1, 3)),
        grid=draw(grids(window)),
        num_frames=draw(st.sampled_from([3, 5])),
        **kind_of(temporal, window=window, extent=draw(extents())),
    )


def windows() -> st.SearchStrategy[int]:
    """Even and odd ones: odd layers are shifted by half of it, rounded down."""
    return st.integers(1, 5)


def grids(window: int = 0) -> st.SearchStrategy[tuple[int, int]]:
    """Rows and columns, multiples of the window where there is one."""
    side = st.integers(1, max(1, 6 // window)).map(lambda n: n * window) if window else st.integers(1, 4)
    return st.tuples(side, side).filter(lambda grid: grid[0] * grid[1] <= MOST_TOKENS)


def extents() -> st.SearchStrategy[tuple[int, int, int]]:
    """Frames, rows and columns of 3D local attention, also larger than the frame."""
    return st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def visible(layout: SequenceLayout, config: TransformerConfig, layer: int) -> tuple[Tensor, Tensor]:
    """Who sees whom, slot by slot from the written rule: (spatial, temporal), bool [L, L]."""
    spatial = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    temporal = spatial.clone()
    places = [(None, i) for i in range(layout.text_len)]
    places += [(f, i) for f in range(layout.num_frames) for i in range(layout.frame_len)]
    for a, (frame, slot) in enumerate(places):
        for b, (key_frame, key_slot) in enumerate(places):
            if frame is None or key_frame is None:
                spatial[a, b] = temporal[a, b] = key_frame is None
                continue
            given = layout.num_bidirectional
            both_given = frame < given and key_frame < given
            causal = frame == key_frame and key_slot <= slot
            spatial[a, b] = frame == key_frame and (both_given or causal)
            earlier = key_frame < frame and not frame < given
            times = layout.frame_times[frame], layout.frame_times[key_frame]
            near = together(config, layer, times, (slot, key_slot))
            temporal[a, b] = (both_given or earlier or causal) and near
    return spatial, temporal


def together(config: TransformerConfig, layer: int, times: tuple[int, int], slots: tuple[int, int]) -> bool:
    """Whether the temporal channel joins two slots at all: one window, or |difference| < extent."""
    (row, column), (key_row, key_column) = (divmod(slot, config.grid[1]) for slot in slots)
    if config.temporal == "window":
        start = config.window - config.window // 2 if layer % 2 else 0
        pairs = ((row, key_row), (column, key_column))
        return all((a + start) // config.window == (b + start) // config.window for a, b in pairs)
    if config.temporal == "local":
        pairs = (times, (row, key_row), (column, key_column))
        return all(abs(a - b) < limit for (a, b), limit in zip(pairs, config.extent, strict=True))
    return True
