"""Small geometries of the real classes, for the transformer's tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from cogvideo_ar.config import TransformerConfig
from cogvideo_ar.transformer import CogVideoTransformer

NUM_IMAGE_TOKENS = 23


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


@st.composite
def configs(draw: st.DrawFn) -> TransformerConfig:
    """Full and windowed temporal channels over small, not always square, grids."""
    window = draw(st.sampled_from([0, 2, 3]))
    side = st.integers(1, 2).map(lambda n: n * window) if window else st.integers(1, 4)
    return tiny_config(
        num_layers=draw(st.integers(1, 3)),
        grid=(draw(side), draw(side)),
        num_frames=draw(st.sampled_from([3, 5])),
        temporal="window" if window else "full",
        window=window,
    )
