"""Training samples of the autoregressive model: clips as image tokens, and five of their frames at one rate.

Hierarchical frame rates (paper section 3.1): of the predefined rates a sample takes the lowest at which its
clip still yields enough frames, and the text begins with the time that these frames span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cogvideo_ar.vqvae import VQVAE
from shared.clips import shapes
from shared.clips.cache import cache_key, read_cache, write_cache

STRIDES = (4, 2, 1)  # frames between two sampled ones, the lowest rate first
CLIP_LENGTHS = {17: 0.6, 9: 0.2, 5: 0.2}  # share of training clips cut to each length


def lowest_rate(num_frames: int, needed: int, strides: Sequence[int] = STRIDES) -> int:
    """The largest stride at which a clip still yields `needed` frames; ValueError where not even 1 does."""
    for stride in sorted(strides, reverse=True):
        if (needed - 1) * stride < num_frames:
            return stride
    raise ValueError(f"a clip of {num_frames} frames is too short for {needed} frames")


def duration_text(stride: int, num_frames: int, fps: float) -> str:
    """Seconds that `num_frames` frames span, as the frame-rate token writes them: "2.0"."""
    return str(float((num_frames - 1) * stride / fps))


@dataclass(frozen=True, kw_only=True)
class TokenClips:
    """Tokenised clips: int64 [N, T, S] and what each shows."""

    tokens: Tensor
    captions: tuple[shapes.Caption, ...]
    made_from: str = ""  # their `shared.clips.cache.cache_key`

    def __len__(self) -> int:
        return len(self.captions)


def tokenize_shapes(
    vqvae: VQVAE, path: Path, *, num_clips: int, seed: int, num_frames: int, quiet: bool = False
) -> TokenClips:
    """Image tokens of `num_clips` training scenes, read from `path` if an earlier call with the same weights
    and numbers wrote them. `num_frames` 1 gives first frames only, for the image stage; `quiet` hides the
    progress bar."""
    scenes = [scene for _, scene in zip(range(num_clips), shapes.scenes("train", seed), strict=False)]
    captions = tuple(scene.caption for scene in scenes)
    key = cache_key(vqvae, num_clips=num_clips, seed=seed, num_frames=num_frames)
    tokens = read_cache(path, "tokens", key, num_clips)
    if tokens is None:
        tokens = _tokenized(vqvae, scenes, num_frames, quiet)
        write_cache(path, "tokens", key, tokens)
    return TokenClips(tokens=tokens.long(), captions=captions, made_from=key)


def _tokenized(vqvae: VQVAE, scenes: Sequence[shapes.Scene], num_frames: int, quiet: bool) -> Tensor:
    """int16 [N, num_frames, S]."""
    per_call = max(1, 64 // num_frames)
    parts = []
    for start in tqdm(range(0, len(scenes), per_call), desc=f"tokens of {len(scenes)} clips", disable=quiet):
        clips = [
            shapes.render(s, num_frames=num_frames).to_pixels() for s in scenes[start : start + per_call]
        ]
        pixels = torch.stack(clips, 0).transpose(1, 2).flatten(0, 1)  # [B, C, T, H, W] -> [B*T, C, H, W]
        codes = vqvae.encode(pixels.contiguous(memory_format=torch.channels_last)).flatten(1)
        parts.append(codes.unflatten(0, (-1, num_frames)).to(torch.int16))
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Five frames of one clip, [5, S], their stride, and the clip's caption."""

    frames: Tensor
    stride: int
    caption: shapes.Caption


def keyframe_sample(clips: TokenClips, rng: np.random.Generator, num_frames: int) -> Sample:
    """Stage 1: a clip cut to a random length, at its lowest fitting rate."""
    index = int(rng.integers(len(clips)))
    length = int(rng.choice(list(CLIP_LENGTHS), p=list(CLIP_LENGTHS.values())))
    stride = lowest_rate(length, num_frames)
    return sample_at(clips, index, stride, num_frames, rng)


def interpolation_sample(clips: TokenClips, rng: np.random.Generator, num_frames: int) -> Sample:
    """Stage 2: five frames at one of the rates that a recursion from the lowest rate passes through."""
    stride = int(rng.choice([s for s in STRIDES if s < max(STRIDES)]))
    return sample_at(clips, int(rng.integers(len(clips))), stride, num_frames, rng)


def sample_at(
    clips: TokenClips, index: int, stride: int, num_frames: int, rng: np.random.Generator
) -> Sample:
    """`num_frames` frames of one clip, `stride` apart, from a random one on."""
    span = (num_frames - 1) * stride + 1
    first = int(rng.integers(clips.tokens.shape[1] - span + 1))
    frames = clips.tokens[index, first : first + span : stride]
    return Sample(frames=frames, stride=stride, caption=clips.captions[index])
