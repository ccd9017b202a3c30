"""Iterative super-resolution (CogView2's IterSR): parts of a fine grid are predicted anew, pass by pass.

A cell's level says in how many of the passes it is predicted again; those of level 0 and below stay for good.
Legend: B frames of a batch, T text, S fine cells, N cells to be predicted, V image tokens, Q passes, M frames
of a video.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo_ar.config import SamplingConfig, SuperResolutionConfig
from cogvideo_ar.generation import TokenSampler, draw_uniforms
from cogvideo_ar.layout import PromptTokenizer, pad_text, prompt_tokens, text_positions
from cogvideo_ar.sampling import draw_index
from cogvideo_ar.super_resolution.direct import PADDING, Inputs, draw_cells
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer, iterative_context
from shared.runtime import check_finite

LEVEL_TILE = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)


def cell_levels(grid: tuple[int, int]) -> Tensor:
    """Level of every cell [S]: the tile, repeated over the grid."""
    tile, (rows, columns) = torch.tensor(LEVEL_TILE), grid
    row_R, column_C = torch.arange(rows) % tile.shape[0], torch.arange(columns) % tile.shape[1]
    return tile[row_R][:, column_C].flatten()


class TopKSampler:
    """Draw from the softmax over the `top_k` likeliest tokens, and over all that are level with the last of
    them: logits [B, V] and uniforms [B, 2], of which the first is used -> tokens int64 [B]."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def sample(self, logits_BV: Tensor, randomness: Tensor) -> Tensor:
        check_finite("image logits", logits_BV)
        return draw_index(self.probabilities(logits_BV), randomness[:, 0].to(logits_BV.device))

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """Probability of every token, float64 [B, V]."""
        z_BV = logits_BV.double()
        least_B1 = z_BV.topk(min(self.top_k, z_BV.shape[1]), dim=1).values[:, -1:]
        return z_BV.masked_fill(z_BV < least_B1, -torch.inf).softmax(1)


def iterative_inputs(config: SuperResolutionConfig, texts: list[list[int]], fine_BS: Tensor) -> Inputs:
    """The first `text_len` tokens of every text, padded on the left, and the fine tokens."""
    if fine_BS.shape != (len(texts), config.fine_len):
        expected = [len(texts), config.fine_len]
        raise ValueError(f"expected fine tokens {expected}, got {list(fine_BS.shape)}")
    cut = [text[: config.text_len] for text in texts]
    text_BT, valid_BT = (x.to(fine_BS.device) for x in pad_text(cut, PADDING, config.text_len))
    return Inputs(
        tokens=torch.cat([text_BT, fine_BS], dim=1),
        positions=text_positions(valid_BT),
        text_valid=valid_BT,
    )


def iterative_hidden(
    model: SuperResolutionTransformer, inputs: Inputs, *, log_weights_T: Tensor | None = None
) -> Tensor:
    """Last hidden states at every place [B, T + S, C]; `log_weights_T` is added to the scores of fine cell ->
    text."""
    context = iterative_context(
        model.config,
        inputs.text_valid,
        model.word_embeddings.weight,
        log_weights_T=log_weights_T,
        dropout=model.config.attention_dropout if model.training else 0.0,
    )
    return model.hidden(inputs.tokens, inputs.positions, context)


@torch.inference_mode()
def refine_pass(
    model: SuperResolutionTransformer,
    texts: list[list[int]],
    fine_BS: Tensor,
    again_BS: Tensor,
    sampler: TokenSampler,
    uniforms_BS2: Tensor,
) -> Tensor:
    """Predict the cells of `again_BS` (bool) in parallel, the others being given; a new tensor [B, S]."""
    masked_BS = fine_BS.masked_fill(again_BS, model.config.start_of_image)
    hidden = iterative_hidden(model, iterative_inputs(model.config, texts, masked_BS))
    x_NC = hidden[:, -model.config.fine_len :][again_BS]
    if not len(x_NC):
        return fine_BS.clone()
    drawn_N = draw_cells(model, x_NC, sampler, uniforms_BS2.to(again_BS.device)[again_BS])
    return fine_BS.masked_scatter(again_BS, drawn_N)


@torch.inference_mode()
def refine_frames(
    model: SuperResolutionTransformer,
    texts: list[list[int]],
    fine_BS: Tensor,
    samplers: Sequence[TokenSampler],
    uniforms_BQS2: Tensor,
    *,
    cells_S: Tensor | None = None,
) -> Tensor:
    """All passes, one sampler each, int64 [B, S]; only cells marked in `cells_S` (bool) may change."""
    levels_S = cell_levels(model.config.fine_grid).to(fine_BS.device)
    if cells_S is not None:
        levels_S = levels_S.masked_fill(~cells_S.to(levels_S.device), 0)
    size, done = model.config.max_batch, []
    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        tokens_BS = fine_BS[part]
        for number, sampler in enumerate(samplers):
            again_BS = (levels_S > number).expand_as(tokens_BS)
            uniforms = uniforms_BQS2[part, number]
            tokens_BS = refine_pass(model, texts[part], tokens_BS, again_BS, sampler, uniforms)
        done.append(tokens_BS)
    return torch.cat(done)


def build_pass_samplers(config: SuperResolutionConfig) -> list[TopKSampler]:
    """One sampler per pass."""
    return [TopKSampler(top_k) for top_k in config.pass_top_k]


def refined_cells(config: SuperResolutionConfig) -> list[int]:
    """How many cells of a frame every pass predicts anew."""
    levels_S = cell_levels(config.fine_grid)
    return [int((levels_S > number).sum()) for number in range(len(config.pass_top_k))]


def refine_videos(
    model: SuperResolutionTransformer,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    samplers: Sequence[TokenSampler],
    generators: Sequence[torch.Generator],
    frames_BMS: Tensor,
) -> Tensor:
    """Every frame of every video by its prompt, int64 [B, M, S]; one CPU generator per video."""
    num_frames = frames_BMS.shape[1]
    uniforms = draw_uniforms(generators, num_frames, len(samplers), model.config.fine_len)
    uniforms = uniforms.to(frames_BMS.device)
    texts = [prompt_tokens(config.prompts.super_resolution, tokenizer, prompt=prompt) for prompt in prompts]
    frame_texts = [text for text in texts for _ in range(num_frames)]
    fine = refine_frames(model, frame_texts, frames_BMS.flatten(0, 1), samplers, uniforms.flatten(0, 1))
    return fine.unflatten(0, (-1, num_frames))
