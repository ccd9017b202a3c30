"""Videos of the net that is learning, for the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cogvideo_ar.config import TransformerConfig
from cogvideo_ar.parts import Parts, build
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideo_ar.transformer import CogVideoTransformer
from shared.offload import Placement
from shared.training_parallel import Strategy, whole_state
from shared.video import Video

Sampler = Callable[[nn.Module, int], Mapping[str, Video]]


def sampler(parts: Parts, stage: int, prompts: Sequence[str], strategy: Strategy) -> Sampler:
    """What `shared.training.train` draws: a video per prompt, of key frames (stage 1) or with one round of
    interpolation (stage 2). The main process makes them, out of a copy in the type of `parts`."""
    config = parts.config.keyframes if stage == 1 else parts.config.interpolation
    device = strategy.device or torch.device("cpu")

    def sample(model: nn.Module, step: int) -> Mapping[str, Video]:
        state = whole_state(model, strategy)
        if not strategy.is_main:
            return {}
        net = _copy(config, state, parts.dtype)
        whole = replace(parts, keyframes=net) if stage == 1 else replace(parts, interpolation=net)
        placement = Placement(device, "none" if device.type == "cpu" else "model")
        placement.place(*whole.nets)
        pipeline = CogVideoPipeline(whole, placement=placement)
        rounds = 0 if stage == 1 else 1
        return {f"prompt-{i}": pipeline(prompt, seed=i, rounds=rounds) for i, prompt in enumerate(prompts)}

    return sample


def _copy(config: TransformerConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> CogVideoTransformer:
    return build(CogVideoTransformer, config, {name: x.to(dtype, copy=True) for name, x in state.items()})
