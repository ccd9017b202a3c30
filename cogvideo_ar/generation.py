"""The only autoregressive loop: prefill, then one cached step per token; conditional and guidance rows alike.

Legend: B samples, R rows = B or 2B (guidance rows behind the conditional ones), T text, G given frames, F
frames, S tokens of a frame, V image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cogvideo_ar.config import RELEASED, SANE, CogLMConfig, SamplingConfig
from cogvideo_ar.layout import SequenceLayout, frame_slots, offset_slots, pad_text
from cogvideo_ar.sampling import CogLMSampler, guide
from cogvideo_ar.transformer import CogVideoTransformer, DecodeState

Sample = Callable[[Tensor, int], Tensor]  # (logits [B, V], number of the token) -> tokens [B]


class TokenSampler(Protocol):
    """Logits [B, V] and uniforms [B, 2] -> tokens [B]."""

    def sample(self, logits_BV: Tensor, randomness: Tensor) -> Tensor: ...


class GreedySampler:
    """The likeliest token; the randomness is ignored."""

    def sample(self, logits_BV: Tensor, randomness: Tensor) -> Tensor:
        return logits_BV.argmax(1)


def _ignore(_: float) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class StageSamplers:
    """The samplers of a run: one for the first frame, one for everything else. `count` is told how many
    tokens have been drawn."""

    first_frame: TokenSampler
    default: TokenSampler
    count: Callable[[float], None] = _ignore


def build_samplers(config: SamplingConfig, cluster_labels: Tensor | None) -> StageSamplers:
    """The two CogLM samplers; `cluster_labels` [V] names the cluster of every image token."""

    def build(draw: CogLMConfig) -> CogLMSampler:
        return CogLMSampler(
            cluster_labels,
            temperature=draw.temperature,
            top_k=draw.top_k,
            temperature2=draw.temperature2,
        )

    return StageSamplers(first_frame=build(config.first_frame), default=build(config.default))


def draw_uniforms(generators: Sequence[torch.Generator], *size: int) -> Tensor:
    """All random numbers of a stage at once, one CPU generator per sample: float64 [B, *size, 2]. A
    sample's numbers do not depend on what else is in the batch, nor on how it is cut. To be moved to the
    model's device as a whole: a copy for every token would wait for the device."""
    return torch.stack([torch.rand(*size, 2, generator=g, dtype=torch.float64) for g in generators])


def pad_prompts(texts: list[list[int]], model: CogVideoTransformer) -> tuple[Tensor, Tensor | None]:
    """Ids [R, T] padded on the left to the longest, and the mask of valid tokens (None: no padding)."""
    ids_RT, valid_RT = pad_text(texts, model.config.pad_token)
    device = model.word_embeddings.weight.device
    return ids_RT.to(device), None if bool(valid_RT.all()) else valid_RT.to(device)


@torch.inference_mode()
def generate_tokens(
    model: CogVideoTransformer,
    layout: SequenceLayout,
    texts: list[list[int]],
    given_BGS: Tensor,
    sample: Sample,
    *,
    guidance_alpha: float | None = None,
    text_weight: float = 0.0,
    release: bool = False,
) -> Tensor:
    """Complete the frames behind the given ones; returns all of them in the order of the sequence [B, F, S].

    With `guidance_alpha`, `texts` holds the B conditional texts and then the B guidance texts.
    `layout.text_len` must be the length of the longest text. `release` keeps the oddities of the released
    prefill.
    """
    num_samples, num_given, frame_len = given_BGS.shape
    groups = 1 if guidance_alpha is None else 2
    state = prefill(model, layout, texts, given_BGS, groups=groups, text_weight=text_weight, release=release)
    frames_BFS = given_BGS.new_empty(num_samples, layout.num_frames, frame_len)
    frames_BFS[:, :num_given] = given_BGS
    starts_B = given_BGS.new_full((num_samples,), model.config.start_of_image)
    number = 0
    for frame in range(num_given, layout.num_frames):
        tokens_B = starts_B
        for slot in range(frame_len):
            logits = model.step(tokens_B.repeat(groups), state)
            if guidance_alpha is not None:
                logits = guide(logits[:num_samples], logits[num_samples:], guidance_alpha)
            tokens_B = sample(logits, number)
            frames_BFS[:, frame, slot] = tokens_B
            number += 1
    return frames_BFS


def prefill(
    model: CogVideoTransformer,
    layout: SequenceLayout,
    texts: list[list[int]],
    given_BGS: Tensor,
    *,
    groups: int,
    text_weight: float,
    release: bool,
) -> DecodeState:
    """Texts and given frames in the caches; the rows are `groups` times the samples."""
    wanted = groups * len(given_BGS)
    if len(texts) != wanted:
        raise ValueError(f"expected {wanted} texts for {len(given_BGS)} samples, got {len(texts)}")
    ids_RT, valid_RT = pad_prompts(texts, model)
    given = frame_slots(given_BGS, model.config.start_of_image).repeat(groups, 1)
    if release and groups == 2 and layout.given_bidirectional:
        # Quirk(interpolation_guider_offset): given frames begin where the conditional text ends
        cond, guider = (
            torch.tensor([*map(len, part)]) for part in (texts[: wanted // 2], texts[wanted // 2 :])
        )
        offsets_B = (cond - guider).clamp(min=0).to(given.device)
        given[wanted // 2 :] = offset_slots(given_BGS, offsets_B, model.config.start_of_image)
    return model.start(
        ids_RT,
        given,
        layout,
        text_valid_BT=valid_RT,
        text_weight=text_weight,
        oddities=RELEASED if release else SANE,
    )
