"""Stage 2: recursive interpolation, 5 -> 9 -> 17 -> 33 frames (upstream `cogvideo_pipeline.py`).

A round cuts the video into blocks of given frames that share their border frames; blocks are independent
and run in one batch, whatever sample they belong to.

Legend: B samples, M frames of a video, K blocks of a video, G given frames of a block, F frames of a block,
S tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo_ar.config import SamplingConfig
from cogvideo_ar.generation import StageSamplers, draw_uniforms
from cogvideo_ar.layout import PromptTokenizer, interpolation_layout, prompt_tokens
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.wavefront import generate_tokens_in_waves


def interpolate(
    model: CogVideoTransformer,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    samplers: StageSamplers,
    generators: Sequence[torch.Generator],
    frames_BMS: Tensor,
) -> Tensor:
    """All rounds of `config.interpolation_durations`; every round puts a frame between any two, int64 [B,
    M, S]."""
    for duration in config.interpolation_durations:
        frames_BMS = interpolate_round(
            model, tokenizer, prompts, config, samplers, generators, frames_BMS, duration=duration
        )
    return frames_BMS


def interpolate_round(
    model: CogVideoTransformer,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    samplers: StageSamplers,
    generators: Sequence[torch.Generator],
    frames_BMS: Tensor,
    *,
    duration: float,
) -> Tensor:
    """[B, M, S] -> [B, 2M - 1, S]; `duration` is the time in seconds that a block spans."""
    template = config.prompts.interpolation
    texts = [prompt_tokens(template, tokenizer, prompt=prompt, duration=duration) for prompt in prompts]
    num_given = interpolation_layout(model.config, 0).num_given
    given = cut_blocks(frames_BMS, num_given)
    num_blocks = given.shape[1]
    targets = (model.config.num_frames - num_given) * model.config.frame_len
    uniforms = draw_uniforms(generators, num_blocks, targets).flatten(0, 1)
    block_texts = [text for text in texts for _ in range(num_blocks)]
    done = [
        _generate_blocks(
            model,
            config,
            samplers,
            block_texts[start : start + config.max_batch],
            given.flatten(0, 1)[start : start + config.max_batch],
            uniforms[start : start + config.max_batch],
        )
        for start in range(0, len(block_texts), config.max_batch)
    ]
    return merge_blocks(torch.cat(done).unflatten(0, (-1, num_blocks)))


def _generate_blocks(
    model: CogVideoTransformer,
    config: SamplingConfig,
    samplers: StageSamplers,
    texts: list[list[int]],
    given: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """Blocks in display order [blocks, F, S]."""
    layout = interpolation_layout(model.config, max(map(len, texts)))
    frames = generate_tokens_in_waves(
        model,
        layout,
        texts,
        given,
        lambda logits, number: samplers.default.sample(logits, uniforms[:, number]),
        text_weight=config.log_text_attention_weights,
        release=config.compat == "release",
    )
    return layout.to_display(frames)


def cut_blocks(frames_BMS: Tensor, num_given: int) -> Tensor:
    """Given frames of every block [B, K, G, S]; neighbouring blocks share a frame."""
    step = num_given - 1
    if frames_BMS.shape[1] < num_given or (frames_BMS.shape[1] - 1) % step:
        raise ValueError(f"{frames_BMS.shape[1]} frames cannot be cut into blocks of {num_given}")
    return frames_BMS.unfold(1, num_given, step).transpose(2, 3)


def merge_blocks(blocks_BKFS: Tensor) -> Tensor:
    """Blocks in display order -> video [B, M, S]; a frame that two blocks share is taken once."""
    return torch.cat([blocks_BKFS[:, :, :-1].flatten(1, 2), blocks_BKFS[:, -1, -1:]], dim=1)
