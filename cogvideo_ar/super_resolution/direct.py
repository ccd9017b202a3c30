"""Direct super-resolution (CogView2's DSR): every frame's coarse tokens to fine ones in one parallel step.

Fine cell j is drawn from the logits of the slot that stands for cell j; all slots hold start-of-image.
Legend: B frames of a batch, T text, P prefix, L sequence, R coarse cells, S fine cells, M frames of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cogvideo_ar.config import SamplingConfig, SuperResolutionConfig
from cogvideo_ar.generation import TokenSampler, draw_uniforms
from cogvideo_ar.layout import PromptTokenizer, pad_text, prompt_tokens, text_positions
from cogvideo_ar.sampling import CogLMSampler
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer, direct_context
from shared.errors import SettingError

PADDING = 0  # an image token: nobody sees it
CELLS_PER_DRAW = 1024  # a draw sorts float64 rows of the whole image vocabulary


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a pass is fed with."""

    tokens: Tensor  # [B, L]
    positions: Tensor  # of the prefix [B, P]; every fine cell has its own
    text_valid: Tensor  # bool [B, T]


def direct_inputs(config: SuperResolutionConfig, texts: list[list[int]], coarse_BR: Tensor) -> Inputs:
    """Texts padded on the left, coarse tokens, and start-of-image in every fine cell. SettingError for a text
    that is too long."""
    check_texts(config, texts)
    if coarse_BR.shape != (len(texts), config.coarse_len):
        expected = [len(texts), config.coarse_len]
        raise ValueError(f"expected coarse tokens {expected}, got {list(coarse_BR.shape)}")
    device = coarse_BR.device
    text_BT, valid_BT = (x.to(device) for x in pad_text(texts, PADDING, config.text_len))
    fine_BS = coarse_BR.new_full((len(texts), config.fine_len), config.start_of_image)
    coarse_R = torch.arange(config.coarse_len, device=device) + config.coarse_position_offset
    coarse_positions_BR = coarse_R.expand(len(texts), -1)
    return Inputs(
        tokens=torch.cat([text_BT, coarse_BR, fine_BS], dim=1),
        positions=torch.cat([text_positions(valid_BT), coarse_positions_BR], dim=1),
        text_valid=valid_BT,
    )


def check_texts(config: SuperResolutionConfig, texts: Sequence[Sequence[int]]) -> None:
    """SettingError for a text that does not fit; to be asked before the stages that come first."""
    longest = max(map(len, texts), default=0)
    if longest > config.max_prompt_len:
        limit = config.max_prompt_len
        raise SettingError(f"the prompt has {longest} tokens, super-resolution takes at most {limit}")


def direct_hidden(
    model: SuperResolutionTransformer,
    inputs: Inputs,
    *,
    log_weights_PP: Tensor | None = None,
    coarse_weight: float = 0.0,
) -> Tensor:
    """Last hidden states at every place [B, L, C]; the two weights are added to scores inside the prefix and
    to those of fine -> coarse cells."""
    context = direct_context(
        model.config,
        inputs.text_valid,
        model.word_embeddings.weight,
        log_weights_PP=log_weights_PP,
        coarse_weight=coarse_weight,
        dropout=model.config.attention_dropout if model.training else 0.0,
    )
    return model.hidden(inputs.tokens, inputs.positions, context)


@torch.inference_mode()
def enlarge_frames(
    model: SuperResolutionTransformer,
    texts: list[list[int]],
    coarse_BR: Tensor,
    sampler: TokenSampler,
    uniforms_BS2: Tensor,
) -> Tensor:
    """One text per frame, tokens of the coarse grid -> those of the fine grid int64 [B, S]; `max_batch`
    frames at a time, which changes no token."""
    size, done = model.config.max_batch, []
    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        hidden = direct_hidden(model, direct_inputs(model.config, texts[part], coarse_BR[part]))
        cells_BSC = hidden[:, -model.config.fine_len :]
        tokens_N = draw_cells(model, cells_BSC.flatten(0, 1), sampler, uniforms_BS2[part].flatten(0, 1))
        done.append(tokens_N.view(len(cells_BSC), -1))
    return torch.cat(done)


def draw_cells(
    model: SuperResolutionTransformer, x_NC: Tensor, sampler: TokenSampler, uniforms_N2: Tensor
) -> Tensor:
    """Hidden states of any cells -> tokens int64 [N], in pieces: all logits would be gigabytes."""
    pieces = zip(x_NC.split(CELLS_PER_DRAW), uniforms_N2.split(CELLS_PER_DRAW), strict=True)
    return torch.cat([sampler.sample(model.image_logits(x), uniforms) for x, uniforms in pieces])


def build_direct_sampler(config: SuperResolutionConfig, cluster_labels: Tensor | None) -> CogLMSampler:
    """The release's draw; `cluster_labels` [V] names the cluster of every image token."""
    draw = config.draw
    return CogLMSampler(
        cluster_labels, temperature=draw.temperature, top_k=draw.top_k, temperature2=draw.temperature2
    )


def enlarge_videos(
    model: SuperResolutionTransformer,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    sampler: TokenSampler,
    generators: Sequence[torch.Generator],
    frames_BMR: Tensor,
) -> Tensor:
    """Every frame of every video by its prompt, int64 [B, M, S]; one CPU generator per video."""
    num_frames = frames_BMR.shape[1]
    uniforms = draw_uniforms(generators, num_frames, model.config.fine_len).to(frames_BMR.device)
    texts = [prompt_tokens(config.prompts.super_resolution, tokenizer, prompt=prompt) for prompt in prompts]
    frame_texts = [text for text in texts for _ in range(num_frames)]
    fine = enlarge_frames(model, frame_texts, frames_BMR.flatten(0, 1), sampler, uniforms.flatten(0, 1))
    return fine.unflatten(0, (-1, num_frames))
