"""How well the model predicts the tokens of true clips, and how much of its codebook they use.

Legend: F key frames, S tokens of a frame, K codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideo_ar.config import SamplingConfig
from cogvideo_ar.layout import (
    SequenceLayout,
    image_layout,
    keyframe_layout,
    pad_text,
    prompt_tokens,
    training_batch,
)
from cogvideo_ar.options import PIXELS_PER_TOKEN
from cogvideo_ar.parts import Parts
from cogvideo_ar.training.objective import token_losses
from shared.transforms import fit_video
from shared.video import Video


@torch.no_grad()
def diagnose(
    parts: Parts, sampling: SamplingConfig, videos: Sequence[Video], prompts: Sequence[str]
) -> dict[str, list[float]]:
    """Per clip `bits_per_token` and `perplexity` of its key frames, each token given the true ones before it
    (the first frame by the base channel, the others behind it), and of their codes `codebook_share` and
    `code_perplexity`. Clips are resized to the model's frames.

    ValueError for a clip that is shorter than the span of the key frames."""
    found: dict[str, list[float]] = {}
    for video, prompt in zip(videos, prompts, strict=True):
        codes_FS = keyframe_codes(parts, sampling, video)
        bits = bits_per_token(parts, sampling, codes_FS, prompt)
        values = {"bits_per_token": bits, "perplexity": 2**bits, **codebook_use(parts, codes_FS)}
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def keyframe_codes(parts: Parts, sampling: SamplingConfig, video: Video) -> Tensor:
    """Codes int64 [F, S] of the frames that stand where the key frames would."""
    config = parts.config.keyframes
    step = sampling.keyframe_duration / (config.num_frames - 1) * video.fps
    places = [round(i * step) for i in range(config.num_frames)]
    if places[-1] >= video.num_frames:
        span = f"{sampling.keyframe_duration:g} s"
        raise ValueError(
            f"key frames span {span}, the clip has {video.num_frames} frames at {video.fps:g} fps"
        )
    rows, columns = config.grid
    kept = Video(frames=video.frames[places], fps=video.fps)
    fitted = fit_video(kept, rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN)
    pixels = fitted.to_pixels().transpose(0, 1)  # [C, F, H, W] -> [F, C, H, W]
    return parts.vqvae.encode(pixels.to(parts.vqvae.quantizer.codebook.device), PIXELS_PER_TOKEN).flatten(1)


def bits_per_token(parts: Parts, sampling: SamplingConfig, codes_FS: Tensor, prompt: str) -> float:
    """Mean cross entropy over the tokens of all frames."""
    config, said = parts.config.keyframes, sampling.prompts
    keys = prompt_tokens(said.keyframes, parts.tokenizer, prompt=prompt, duration=sampling.keyframe_duration)
    image = prompt_tokens(said.first_frame, parts.tokenizer, prompt=prompt)
    first = frame_losses(parts, image, codes_FS[:1], image_layout(config, len(image)))
    others = frame_losses(parts, keys, codes_FS, keyframe_layout(config, len(keys)))
    return float(torch.cat([first, others]).mean()) / math.log(2)


def frame_losses(parts: Parts, text: list[int], codes_FS: Tensor, layout: SequenceLayout) -> Tensor:
    """Cross entropy in nats of every token that is to be generated."""
    model, config = parts.keyframes, parts.config.keyframes
    ids = pad_text([text], config.pad_token)[0].to(codes_FS.device)
    batch = training_batch(layout, ids, codes_FS[None], start_of_image=config.start_of_image)
    losses = token_losses(model(batch.tokens, layout), batch.labels)
    return losses[batch.loss_mask].double()


def codebook_use(parts: Parts, codes_FS: Tensor) -> dict[str, float]:
    """Share of the codebook's entries in the codes, and 2 to the entropy of the codes."""
    counts_K = torch.bincount(codes_FS.flatten(), minlength=len(parts.vqvae.quantizer.codebook)).double()
    share_K = counts_K / counts_K.sum()
    entropy = -(share_K * share_K.clamp(min=1e-30).log2()).sum()
    return {"codebook_share": float((counts_K > 0).double().mean()), "code_perplexity": float(2**entropy)}
