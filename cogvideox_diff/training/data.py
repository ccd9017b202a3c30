"""Training samples of the diffusion model: clips and stills as VAE latents, encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.clips import shapes
from shared.clips.cache import cache_key, read_cache, write_cache
from shared.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class LatentClips:
    """Posterior means [N, T, Z, h, w] in the VAE's own scale, and what each shows."""

    latents: Tensor
    captions: tuple[shapes.Caption, ...]

    def __len__(self) -> int:
        return len(self.captions)


def pixel_batch(seed: int, step: int, size: int, num_frames: int) -> Tensor:
    """float32 [size, 3, num_frames, 64, 64] in -1..1; short clips start anywhere in whole ones."""
    if num_frames == 1:
        return shapes.stills(seed, step, size)[0][:, :, None]
    clips = [video.to_pixels() for _, video in shapes.batch(seed, step, size)]
    draws = torch.Generator().manual_seed(step)
    starts = torch.randint(shapes.NUM_FRAMES - num_frames + 1, (size,), generator=draws).tolist()
    return torch.stack([clip[:, s : s + num_frames] for clip, s in zip(clips, starts, strict=True)])


@torch.no_grad()
def encode_shapes(
    vae: CausalVAE,
    path: Path,
    *,
    num_clips: int,
    seed: int,
    num_frames: int,
    size: int = shapes.SIZE,
    quiet: bool = False,
) -> LatentClips:
    """Latents of `num_clips` training scenes, read from `path` if an earlier call with the same weights and
    numbers wrote them (a path for each `size`, in pixels); `quiet` hides the progress bar."""
    scenes = [scene for _, scene in zip(range(num_clips), shapes.scenes("train", seed), strict=False)]
    captions = tuple(scene.caption for scene in scenes)
    key = cache_key(vae, num_clips=num_clips, seed=seed, num_frames=num_frames)
    latents = read_cache(path, "latents", key, num_clips)
    if latents is None:
        per_call = 4 if num_frames > 1 else 32
        parts = []
        for start in tqdm(range(0, num_clips, per_call), desc=f"latents of {num_clips} clips", disable=quiet):
            some = scenes[start : start + per_call]
            pixels = torch.stack(
                [shapes.render(s, num_frames=num_frames, size=size).to_pixels() for s in some]
            )
            with torch.autocast(pixels.device.type, dtype=torch.bfloat16):  # twice as fast, rounds to 0.4 %
                mean = vae.encode(pixels).mean.transpose(1, 2)  # [B, Z, t, h, w] -> [B, t, Z, h, w]
            parts.append(mean.to(torch.float16))
        latents = torch.cat(parts).contiguous()
        write_cache(path, "latents", key, latents)
    return LatentClips(latents=latents, captions=captions)


def unit_scale(clips: LatentClips) -> float:
    """What gives the latents unit variance around the background of their frame, to four digits.

    The background makes up four fifths of the variance; measured with it, what tells one shape from
    another would be under the noise for most of the timesteps."""
    latents = clips.latents.float()
    background = latents.flatten(3).median(-1).values[..., None, None]
    return float(f"{1 / float((latents - background).std()):.4g}")


def clearest(clips: LatentClips, share: float) -> LatentClips:
    """The share of the clips whose latents differ most from their background: a score that needs no judge."""
    if not 0 < share <= 1:
        raise SettingError(f"quality_share must be above 0 and at most 1, got {share}")
    latents = clips.latents.float()
    background = latents.flatten(3).median(-1).values[..., None, None]
    scores = (latents - background).square().flatten(1).mean(1)
    best = scores.argsort(descending=True)[: max(1, round(share * len(clips)))].sort().values
    captions = tuple(clips.captions[i] for i in best.tolist())
    return LatentClips(latents=clips.latents[best], captions=captions)
