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
    known_BMS: Tensor | None = None,
) -> Tensor:
    """All rounds of `config.interpolation_durations`; every round puts a frame between any two, int64 [B,
    M, S]. `known_BMS` holds the frames of the finished video that are given, and -1 elsewhere."""
    durations = config.interpolation_durations
    for left, duration in zip(reversed(range(len(durations))), durations, strict=True):
        known = None if known_BMS is None else known_BMS[:, :: 1 << left]
        frames_BMS = interpolate_round(
            model, tokenizer, prompts, config, samplers, generators, frames_BMS, known, duration=duration
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
    known_BMS: Tensor | None = None,
    *,
    duration: float,
) -> Tensor:
    """[B, M, S] -> [B, 2M - 1, S]; `duration` is the time in seconds that a block spans. `known_BMS` [B, 2M -
    1, S] holds the frames that are given, and -1 elsewhere."""
    template = config.prompts.interpolation
    texts = [prompt_tokens(template, tokenizer, prompt=prompt, duration=duration) for prompt in prompts]
    guider = prompt_tokens(config.prompts.interpolation_guider, tokenizer, duration=duration)
    num_given = interpolation_layout(model.config, 0).num_given
    given = cut_blocks(frames_BMS, num_given)
    num_blocks = given.shape[1]
    targets = (model.config.num_frames - num_given) * model.config.frame_len
    uniforms = draw_uniforms(generators, num_blocks, targets).flatten(0, 1).to(frames_BMS.device)
    block_texts = [text for text in texts for _ in range(num_blocks)]
    forced_KT = None if known_BMS is None else cut_targets(known_BMS, model.config.num_frames)
    done = [
        _generate_blocks(
            model,
            config,
            samplers,
            block_texts[start : start + config.max_batch],
            guider,
            given.flatten(0, 1)[start : start + config.max_batch],
            uniforms[start : start + config.max_batch],
            None if forced_KT is None else forced_KT[start : start + config.max_batch],
        )
        for start in range(0, len(block_texts), config.max_batch)
    ]
    return merge_blocks(torch.cat(done).unflatten(0, (-1, num_blocks)))


def _generate_blocks(
    model: CogVideoTransformer,
    config: SamplingConfig,
    samplers: StageSamplers,
    texts: list[list[int]],
    guider: list[int],
    given: Tensor,
    uniforms: Tensor,
    forced: Tensor | None,
) -> Tensor:
    """Blocks in display order [blocks, F, S]; as with key frames, guidance replaces the text weight."""
    guided = config.interpolation_guidance_alpha != 1
    if guided:
        texts = [*texts, *[guider] * len(texts)]
    layout = interpolation_layout(model.config, max(map(len, texts)))

    def sample(logits: Tensor, number: int) -> Tensor:
        samplers.count(len(logits))
        drawn = samplers.default.sample(logits, uniforms[:, number])
        return drawn if forced is None else forced[:, number].where(forced[:, number] >= 0, drawn)

    frames = generate_tokens_in_waves(
        model,
        layout,
        texts,
        given,
        sample,
        guidance_alpha=config.interpolation_guidance_alpha if guided else None,
        text_weight=0.0 if guided else config.log_text_attention_weights,
        release=config.compat == "release",
    )
    return layout.to_display(frames)


def cut_blocks(frames_BMS: Tensor, num_given: int) -> Tensor:
    """Given frames of every block [B, K, G, S]; neighbouring blocks share a frame."""
    step = num_given - 1
    if frames_BMS.shape[1] < num_given or (frames_BMS.shape[1] - 1) % step:
        raise ValueError(f"{frames_BMS.shape[1]} frames cannot be cut into blocks of {num_given}")
    return frames_BMS.unfold(1, num_given, step).transpose(2, 3)


def cut_targets(frames_BMS: Tensor, num_frames: int) -> Tensor:
    """Frames of a finished round -> the tokens that every block of `num_frames` frames generates, in that
    order [B * K, T]."""
    blocks_BKFS = frames_BMS.unfold(1, num_frames, num_frames - 1).transpose(2, 3)
    return blocks_BKFS[:, :, 1::2].flatten(0, 1).flatten(1)


def merge_blocks(blocks_BKFS: Tensor) -> Tensor:
    """Blocks in display order -> video [B, M, S]; a frame that two blocks share is taken once."""
    return torch.cat([blocks_BKFS[:, :, :-1].flatten(1, 2), blocks_BKFS[:, -1, -1:]], dim=1)
