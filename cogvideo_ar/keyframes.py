"""Stage 1: the first frame by the base channel alone, then the key frames (upstream `cogvideo_pipeline.py`).

Legend: B samples, F frames, S tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo_ar.config import SamplingConfig
from cogvideo_ar.generation import StageSamplers, draw_uniforms, generate_tokens
from cogvideo_ar.layout import PromptTokenizer, image_layout, keyframe_layout, prompt_tokens
from cogvideo_ar.speculation import generate_tokens_with_guesses
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.wavefront import generate_tokens_in_waves


def generate_first_frames(
    model: CogVideoTransformer,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    samplers: StageSamplers,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """One frame per prompt, int64 [B, 1, S]; one CPU generator per prompt."""
    texts = [prompt_tokens(config.prompts.first_frame, tokenizer, prompt=prompt) for prompt in prompts]
    layout = image_layout(model.config, max(map(len, texts)))
    device = model.word_embeddings.weight.device
    uniforms = draw_uniforms(generators, layout.frame_len).to(device)
    last = layout.frame_len - 1

    def sample(logits: Tensor, number: int) -> Tensor:
        samplers.count(len(logits))
        # Quirk(first_frame_last_token): the release changes samplers one token early
        early = config.compat == "release" and number == last
        sampler = samplers.default if early else samplers.first_frame
        return sampler.sample(logits, uniforms[:, number])

    nothing = torch.empty(len(texts), 0, layout.frame_len, dtype=torch.long, device=device)
    return generate_tokens(
        model, layout, texts, nothing, sample, text_weight=config.log_text_attention_weights
    )


def generate_keyframes(
    model: CogVideoTransformer,
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    samplers: StageSamplers,
    generators: Sequence[torch.Generator],
    given_BGS: Tensor,
    num_frames: int | None = None,
) -> Tensor:
    """The given frames and the key frames behind them, int64 [B, F, S]; guided unless `guidance_alpha` is 1.
    `num_frames` counts all of them (default: as many as the model was trained with).

    Under guidance the attention to the text is not strengthened (as upstream)."""
    guided, duration = config.guidance_alpha != 1, config.keyframe_duration
    template = config.prompts.keyframes_guided if guided else config.prompts.keyframes
    texts = [prompt_tokens(template, tokenizer, prompt=prompt, duration=duration) for prompt in prompts]
    if guided:
        guider = prompt_tokens(config.prompts.keyframes_guider, tokenizer, duration=duration)
        texts += [guider] * len(prompts)
    text_len, num_given = max(map(len, texts)), given_BGS.shape[1]
    layout = keyframe_layout(model.config, text_len, num_frames=num_frames, num_given=num_given)
    targets = (layout.num_frames - layout.num_given) * layout.frame_len
    uniforms = draw_uniforms(generators, targets).to(given_BGS.device)

    def sample(logits: Tensor, number: int) -> Tensor:
        samplers.count(len(logits))
        return samplers.default.sample(logits, uniforms[:, number])

    def sample_run(logits_PV: Tensor, first: int) -> Tensor:
        return samplers.default.sample(logits_PV, uniforms[0, first : first + len(logits_PV)])

    options = {
        "guidance_alpha": config.guidance_alpha if guided else None,
        "text_weight": 0.0 if guided else config.log_text_attention_weights,
        "release": config.compat == "release",
    }
    given = (model, layout, texts, given_BGS)
    if model.config.temporal != "full":
        return generate_tokens_in_waves(*given, sample, **options)
    if len(prompts) > 1 or num_given == 0:  # it depends on whole frames: nothing to be gained by waves
        return generate_tokens(*given, sample, **options)
    return generate_tokens_with_guesses(*given, sample_run, count=samplers.count, **options)
