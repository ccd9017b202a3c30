"""A tiny transformer, its inputs, and adapters on it. Not a test file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogvideox_diff.config import TransformerConfig
from cogvideox_diff.lora import inject, lora_parameters
from cogvideox_diff.transformer import ExpertTransformer

RANK, ALPHA = 3, 6.0


def tiny_model(seed: int = 0, **changes: Any) -> ExpertTransformer:
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "position": "rope",
        "sample_size": (3, 4, 6),
        "time_embed_dim": 24,
        "text_dim": 20,
        "text_len": 5,
    }
    model = ExpertTransformer(TransformerConfig(**settings | changes)).eval()
    model.init_weights(torch.Generator().manual_seed(seed), zero_modulation=False)
    return model


def run(model: ExpertTransformer, seed: int = 7) -> Tensor:
    config, rng = model.config, torch.Generator().manual_seed(seed)
    latents = torch.randn(2, config.sample_size[0], config.in_channels, 4, 6, generator=rng)
    text = torch.randn(2, config.text_len, config.text_dim, generator=rng)
    dtype = model.text_proj.weight.dtype
    with torch.no_grad():
        return model(latents.to(dtype), text.to(dtype), torch.tensor([900, 20]))


def randomise(model: ExpertTransformer, seed: int = 1, name: str | None = None) -> None:
    """As if trained: B no longer zero."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model, name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)


def adapted_model(**options: Any) -> ExpertTransformer:
    model = tiny_model()
    inject(model, RANK, ALPHA, **options)
    randomise(model)
    return model
