"""Videos of the nets that are learning, for the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.formats import Parts
from cogvideox_diff.pipeline import CogVideoXPipeline
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.training_parallel import Strategy
from shared.video import Video


def recipe_sampler(
    config: CogVideoXConfig, vae: CausalVAE, tokenizer: Path, scale: float, prompt: str, strategy: Strategy
) -> Callable[[nn.Module, int], Mapping[str, Video]]:
    """What `shared.training.train` draws of a recipe's text encoder and transformer, which every process
    calls: a video of the prompt, in the preset's size."""
    config = replace(config, vae=replace(config.vae, scaling_factor=scale))
    vae.config = config.vae
    device = strategy.device or torch.device("cpu")

    def sample(model: nn.Module, step: int) -> Mapping[str, Video]:
        nets = cast(Any, model)
        parts = Parts(transformer=nets.transformer, vae=vae, text_encoder=nets.text_encoder)
        pipeline = CogVideoXPipeline(config, parts, tokenizer, device=device)
        return {"prompt-0": pipeline(prompt, seed=0)}

    return sample
