"""A folder of captioned clips as training samples: read, fitted to a size, encoded once and kept.

Every clip and caption has a file in the cache, named after all that its content depends on: the clip's
bytes, the size and the way it was made to fit, and the weights. So a cache may be shared by runs, and a
changed clip is encoded anew. Image files are clips of one frame.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.geometry import VideoGeometry
from cogvideox_diff.training.finetune import PackedSamples, Samples
from cogvideox_diff.training.frames import finetune_indices
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import load_tensors, save_tensors
from shared.clips.buckets import Bucket, assign
from shared.clips.dataset import (
    IMAGE_SUFFIXES,
    Clip,
    Extent,
    content_key,
    folder_of,
    probe,
    read_clips,
    read_frames,
)
from shared.errors import SettingError
from shared.transforms import fit_video, resize
from shared.video import Video
from shared.video_io import read_image

Fit = Literal["cover", "stretch"]
TextEncoder = Callable[[str], Tensor]  # a prompt -> features [L, D]


@dataclass(frozen=True, kw_only=True)
class TrainClip:
    """A clip with the size it is trained in."""

    clip: Clip
    extent: Extent
    size: Bucket


def check_clips(path: Path, sizes: Sequence[Bucket]) -> tuple[TrainClip, ...]:
    """The data set's clips and the size of each: where there are several, the bucket that fits it. Reads what
    the files say of themselves. SettingError for a clip without a caption, UserError for one that is no
    video."""
    found = []
    for clip in read_clips(path):
        if not clip.caption:
            raise SettingError(f"{clip.name} in {folder_of(path)} has no caption")
        extent = _extent(clip.video)
        several = len(sizes) > 1
        size = assign(extent.num_frames, extent.height, extent.width, sizes) if several else sizes[0]
        found.append(TrainClip(clip=clip, extent=extent, size=size))
    return tuple(found)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _extent(path: Path) -> Extent:
    if not is_image(path):
        return probe(path)
    height, width, _ = read_image(path).shape
    return Extent(num_frames=1, fps=1.0, height=height, width=width)


def check_sizes(config: CogVideoXConfig, sizes: Sequence[Bucket]) -> None:
    """SettingError unless the model can be trained on every size; a single frame (an image) is legal too."""
    for size in sizes:
        VideoGeometry.of(config, height=size.height, width=size.width, num_frames=size.num_frames)


# ---- encoding


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where encoded clips and captions are kept; `model` is the mark of the weights that encode them."""

    folder: Path
    model: str

    def load(self, kind: str, **made_from: object) -> tuple[Path, dict[str, Tensor] | None]:
        """The file of what is made from this, and its tensors if it is there."""
        content = json.dumps({"kind": kind, "model": self.model} | made_from, sort_keys=True)
        path = self.folder / kind / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"
        return path, load_tensors(path) if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A clip's posterior, float16 [T, C, H, W] and not scaled, and its first frame uint8 [h, w, 3]."""

    mean: Tensor
    deviation: Tensor
    first_frame: Tensor


def encode_clips(
    clips: Sequence[TrainClip],
    vae: CausalVAE,
    cache: Cache,
    *,
    fit: Fit = "cover",
    tiled: bool = False,
    quiet: bool = False,
) -> list[Encoded]:
    """All clips, from the cache where they are there."""
    bar = tqdm(clips, desc="latents of clips", disable=quiet)
    return [_encoded(clip, vae, cache, fit, tiled) for clip in bar]


@torch.no_grad()
def _encoded(item: TrainClip, vae: CausalVAE, cache: Cache, fit: Fit, tiled: bool) -> Encoded:
    key = content_key(item.clip.video)
    path, tensors = cache.load("latents", clip=key, size=asdict(item.size), fit=fit, tiled=tiled)
    if tensors is None:
        video = read_fitted(item, fit)
        posterior = vae.encode(video.to_pixels()[None].to(next(vae.parameters())), tiled=tiled)
        moments = {"mean": posterior.mean, "deviation": torch.exp(posterior.logvar / 2)}
        tensors = {name: x[0].transpose(0, 1).half().cpu().contiguous() for name, x in moments.items()}
        tensors["first_frame"] = video.frames[0].contiguous()
        save_tensors(tensors, path)
    return Encoded(**tensors)


def read_fitted(item: TrainClip, fit: Fit) -> Video:
    """The clip's frames (as the finetuning data sets choose them) in its size: "cover" cuts away what is too
    much, as SAT; "stretch" distorts, as the finetuning scripts."""
    size = item.size
    if is_image(item.clip.video):
        frames = read_image(item.clip.video).expand(size.num_frames, -1, -1, -1)
        video = Video(frames=frames, fps=1.0)
    else:
        chosen = finetune_indices(item.extent.num_frames, max_frames=size.num_frames)
        video = read_frames(item.clip.video, chosen, item.extent.fps)
    if fit == "cover":
        return fit_video(video, size.height, size.width)
    stretched = resize(video.frames.permute(0, 3, 1, 2), size.height, size.width)  # [T, C, H, W]
    return Video(frames=stretched.permute(0, 2, 3, 1).contiguous(), fps=video.fps)


def encode_texts(texts: Sequence[str], encode: TextEncoder, cache: Cache) -> dict[str, Tensor]:
    """Features [L, D] of every different text."""
    found = {}
    for text in dict.fromkeys(texts):
        path, tensors = cache.load("text", text=text)
        if tensors is None:
            tensors = {"features": encode(text).cpu().contiguous()}
            save_tensors(tensors, path)
        found[text] = tensors["features"]
    return found


# ---- samples


def stacked_samples(
    clips: Sequence[TrainClip], encoded: Sequence[Encoded], texts: dict[str, Tensor], unconditional: Tensor
) -> Samples:
    """Of clips of one size."""
    features, caption = _captions(clips, texts)
    return Samples(
        latents=torch.stack([clip.mean for clip in encoded]),
        deviations=torch.stack([clip.deviation for clip in encoded]),
        features=features,
        caption=caption,
        unconditional=unconditional,
        first_frames=torch.stack([clip.first_frame for clip in encoded]),
    )


def packed_samples(
    clips: Sequence[TrainClip], encoded: Sequence[Encoded], texts: dict[str, Tensor], unconditional: Tensor
) -> PackedSamples:
    """Of clips of any sizes."""
    features, caption = _captions(clips, texts)
    return PackedSamples(
        latents=[clip.mean for clip in encoded],
        deviations=[clip.deviation for clip in encoded],
        features=features,
        caption=caption,
        unconditional=unconditional,
    )


def _captions(clips: Sequence[TrainClip], texts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    used = list(dict.fromkeys(item.clip.caption for item in clips))
    place = {text: i for i, text in enumerate(used)}
    return torch.stack([texts[text] for text in used]), torch.tensor([place[c.clip.caption] for c in clips])
