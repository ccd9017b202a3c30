"""A list of clips as the transformer's training reads it: VAE posteriors, first frames and text features.

Posteriors are kept as mean and deviation in the VAE's own scale, without noise that would be frozen with
them. Captions are encoded once each, and the empty one for dropout. Image files are clips of one frame.

Legend: T latent frames, C latent channels, H/W latent rows/columns, L text tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cogvideox_diff.codec import load_vae
from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.formats import ModelFolder, load_text_encoder
from cogvideox_diff.geometry import VideoGeometry
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.training.finetune import Samples
from cogvideox_diff.training.frames import finetune_indices, sat_indices
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.clips.buckets import Bucket, Rule, assign, losses
from shared.clips.dataset import IMAGE_SUFFIXES, Clip, Extent, even_count, even_indices, read_frames
from shared.clips.precompute import (
    Item,
    Planned,
    ShardReader,
    Shards,
    make_key,
    none_left,
    plan_clips,
    precompute_clips,
    read_index,
    write_index,
    write_shards,
)
from shared.errors import BatchError, SettingError, UserError
from shared.runtime import check_finite, spare_threads
from shared.tokenizers.t5 import T5Tokenizer
from shared.transforms import fit_video, resize
from shared.video import Video
from shared.video_io import read_image

KIND, LATENTS, TEXT = "latents", "latents", "text"
FrameRule = Literal["even", "sat", "finetune"]
Fit = Literal["cover", "stretch"]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a clip is made to fit. `frames`: "even" takes the frames nearest to even times at `fps`, from the
    first on; "sat" and "finetune" as the released data sets do (`training.frames`), oddities and repeated
    last frames included. `fit`: "cover" cuts away what is too much, as SAT; "stretch" distorts, as the
    finetuning scripts."""

    buckets: tuple[Bucket, ...]
    fps: float
    frames: FrameRule = "even"
    rule: Rule = "aspect"
    fit: Fit = "cover"

    def __post_init__(self) -> None:
        if self.fit not in get_args(Fit):
            raise SettingError(f"fit must be cover or stretch, got {self.fit!r}")
        if self.frames not in get_args(FrameRule):
            raise SettingError(f"frames must be one of {', '.join(get_args(FrameRule))}, got {self.frames!r}")
        if not self.buckets:
            raise SettingError("at least one size is needed, as in 49x480x720")
        if not self.fps > 0:
            raise SettingError(f"fps must be positive, got {self.fps}")


def check_buckets(buckets: Sequence[Bucket], config: CogVideoXConfig) -> None:
    """SettingError for a size that the model cannot be trained in; it names the nearest legal one."""
    for bucket in buckets:
        try:
            VideoGeometry.of(config, height=bucket.height, width=bucket.width, num_frames=bucket.num_frames)
        except SettingError as error:
            raise SettingError(f"size {bucket}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class LatentReader:
    """Clips to pixels of their bucket's size."""

    preparation: Preparation

    def plan(self, clip: Clip, extent: Extent) -> dict[str, Any]:
        wanted, buckets = self.preparation, self.preparation.buckets
        if is_image(clip):
            height, width, _ = read_image(clip.video).shape  # upright
            extent = replace(extent, num_frames=1, fps=wanted.fps, height=height, width=width)
        bucket = assign(self._count(extent), extent.height, extent.width, buckets, wanted.rule)
        plan = {"bucket": str(bucket), "num_frames": extent.num_frames, "fps": extent.fps}
        self._indices(plan)  # refuses a clip that the rule cannot sample
        return plan | losses(extent.height, extent.width, bucket)

    def read(self, clip: Clip, plan: Mapping[str, Any]) -> Video:
        bucket, indices = Bucket.parse(plan["bucket"]), self._indices(plan)
        if is_image(clip):
            frames = read_image(clip.video).expand(len(indices), -1, -1, -1)
            video = Video(frames=frames, fps=self.preparation.fps)
        else:
            video = read_frames(clip.video, indices, self.preparation.fps)
        fitted = fit_video if self.preparation.fit == "cover" else stretch_video
        return fitted(video, bucket.height, bucket.width)

    def _count(self, extent: Extent) -> int:
        """Frames to choose a bucket by; the released rules pad what is too short for every bucket."""
        least = min(bucket.num_frames for bucket in self.preparation.buckets)
        match self.preparation.frames:
            case "even":
                return even_count(extent.num_frames, extent.fps, self.preparation.fps)
            case "sat":
                return max(least, int(extent.num_frames / extent.fps * self.preparation.fps))
            case "finetune":
                return max(least, extent.num_frames)

    def _indices(self, plan: Mapping[str, Any]) -> tuple[int, ...]:
        count, target = Bucket.parse(plan["bucket"]).num_frames, self.preparation.fps
        match self.preparation.frames:
            case "even":
                return even_indices(plan["fps"], target, count)
            case "sat":
                return sat_indices(plan["num_frames"], plan["fps"], target_fps=target, max_frames=count)
            case "finetune":
                return finetune_indices(plan["num_frames"], max_frames=count)


def is_image(clip: Clip) -> bool:
    return clip.video.suffix.lower() in IMAGE_SUFFIXES


def stretch_video(video: Video, height: int, width: int) -> Video:
    """All of the picture, distorted to this size."""
    frames = resize(video.frames.permute(0, 3, 1, 2), height, width)  # [T, C, H, W]
    return Video(frames=frames.permute(0, 2, 3, 1).contiguous(), fps=video.fps)


@torch.no_grad()
def encode_clip(vae: CausalVAE, video: Video, *, tiled: bool = False) -> dict[str, Tensor]:
    """ "latents" and "deviation" [T, C, H, W] of the posterior in the VAE's own scale and dtype, and
    "first_frame" uint8 [height, width, 3], which image-to-video training encodes with noise of its own."""
    pixels = video.to_pixels()[None].to(next(vae.parameters()))
    posterior = vae.encode(pixels, tiled=tiled)
    moments = {"latents": posterior.mean, "deviation": torch.exp(posterior.logvar / 2)}
    tensors = {
        name: check_finite(name, x[0]).transpose(0, 1).cpu()  # [C, T, ...] -> [T, C, ...]
        for name, x in moments.items()
    }
    return tensors | {"first_frame": video.frames[0]}


@torch.no_grad()
def encode_caption(encoder: T5TextEncoder, tokenizer: T5Tokenizer, caption: str) -> dict[str, Tensor]:
    """ "features" [L, D]."""
    ids = tokenizer([caption]).ids.to(next(encoder.parameters()).device)
    return {"features": check_finite("text features", encoder(ids)[0]).cpu()}


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What turns clips and captions into tensors."""

    vae: CausalVAE
    text_encoder: T5TextEncoder
    tokenizer: T5Tokenizer


def load_encoders(folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> Encoders:
    """Those of a model, without its transformer."""
    vae, text_encoder = load_vae(folder, dtype, device), load_text_encoder(folder, dtype).to(device)
    spare_threads(vae, text_encoder)
    tokenizer = T5Tokenizer(folder.tokenizer, text_len=folder.config.text.text_len)
    return Encoders(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)


def precompute(
    clips: Sequence[Clip],
    preparation: Preparation,
    load: Callable[[], Encoders],
    marks: Mapping[str, str],
    folder: Path,
    *,
    tiled: bool = False,
    per_shard: int = 64,
    num_workers: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Encode all clips and captions into `folder` and write its index, which is returned. `marks` ("encoder",
    "dtype") name the weights that `load` reads; they are read once the files have been looked at, and only if
    anything is to be encoded."""
    planned = plan_clips(clips, LatentReader(preparation=preparation), num_workers=num_workers, quiet=quiet)
    return precompute_planned(
        planned, preparation, load, marks, folder,
        tiled=tiled, per_shard=per_shard, num_workers=num_workers, quiet=quiet,
    )  # fmt: skip


def precompute_planned(
    planned: Sequence[Planned],
    preparation: Preparation,
    load: Callable[[], Encoders],
    marks: Mapping[str, str],
    folder: Path,
    *,
    tiled: bool = False,
    per_shard: int = 64,
    num_workers: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """`precompute` of clips that `plan_clips` has looked at. BatchError where none of them can be used."""
    check_usable(planned)
    encoders = cache(load)
    settings = dict(marks) | {"fps": preparation.fps, "frames": preparation.frames, "fit": preparation.fit}
    settings |= {"tiled": tiled}
    done, left, latents = precompute_clips(
        planned, LatentReader(preparation=preparation), partial(_encode_video, encoders, tiled), settings,
        folder / LATENTS, per_shard=per_shard, num_workers=num_workers, quiet=quiet,
    )  # fmt: skip
    keys, text = _write_captions(planned, encoders, marks, folder / TEXT, per_shard, quiet)
    rows = [row | {"text": keys[row["caption"]]} for row in done]
    told = settings | {"sizes": [str(b) for b in preparation.buckets], "rule": preparation.rule}
    told |= {"no_caption": keys[""]}
    shards = {LATENTS: latents, TEXT: text}
    return write_index(folder, kind=KIND, settings=told, clips=rows, skipped=left, shards=shards)


def check_usable(planned: Sequence[Planned]) -> None:
    if all(p.problem for p in planned):
        raise BatchError(none_left([{"reason": p.problem} for p in planned]))


def _encode_video(encoders: Callable[[], Encoders], tiled: bool, video: Video) -> dict[str, Tensor]:
    return encode_clip(encoders().vae, video, tiled=tiled)


def _encode_text(encoders: Callable[[], Encoders], caption: str) -> dict[str, Tensor]:
    return encode_caption(encoders().text_encoder, encoders().tokenizer, caption)


def _write_captions(
    planned: Sequence[Planned],
    encoders: Callable[[], Encoders],
    marks: Mapping[str, str],
    folder: Path,
    per_shard: int,
    quiet: bool,
) -> tuple[dict[str, str], Shards]:
    """The key of every different caption, "" among them, and the shards of their features."""
    captions = ["", *dict.fromkeys(p.clip.caption for p in planned if not p.problem and p.clip.caption)]
    keys = {caption: make_key(caption, dict(marks)) for caption in captions}
    items = [Item(key=keys[caption], source=caption) for caption in captions]
    encode = partial(_encode_text, encoders)
    shards = write_shards(
        items, _caption_of, encode, folder, per_shard=per_shard, quiet=quiet, unit="caption"
    )
    if shards.skipped:
        raise UserError(f"a caption cannot be encoded: {next(iter(shards.skipped.values()))}")
    return keys, shards


def _caption_of(item: Item) -> str:
    return item.source


class LatentClips:
    """What `precompute` wrote, by number: "latents", "deviation", "first_frame" and "features" of a clip.

    `groups` are the sizes, as `shared.clips.stream.BatchPlan` wants them; `no_caption` are the features of
    the empty caption [L, D]."""

    def __init__(self, folder: Path) -> None:
        index = read_index(folder, KIND)
        self.skipped: list[dict[str, Any]] = index["skipped"]
        self.rows: list[dict[str, Any]] = index["clips"]
        self.groups = [row["bucket"] for row in self.rows]
        self._latents = ShardReader(folder / LATENTS, index["shards"][LATENTS])
        self._text = ShardReader(folder / TEXT, index["shards"][TEXT])
        self.no_caption = self._text[index["settings"]["no_caption"]]["features"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        row = self.rows[place]
        return self._latents[row["key"]] | self._text[row["text"]]

    def samples(self, size: str | None = None) -> Samples:
        """Everything of one size (None: the only one) in memory."""
        sizes = sorted(set(self.groups))
        if size is None and len(sizes) == 1:
            (size,) = sizes
        if size not in sizes:
            raise SettingError(f"the clips have the sizes {', '.join(sizes)}; name one of them, got {size}")
        rows = [row for row in self.rows if row["bucket"] == size]
        number = {key: place for place, key in enumerate(dict.fromkeys(row["text"] for row in rows))}
        clips = [self._latents[row["key"]] for row in rows]
        return Samples(
            latents=torch.stack([clip["latents"] for clip in clips]),
            deviations=torch.stack([clip["deviation"] for clip in clips]),
            features=torch.stack([self._text[key]["features"] for key in number]),
            caption=torch.tensor([number[row["text"]] for row in rows]),
            unconditional=self.no_caption,
            first_frames=torch.stack([clip["first_frame"] for clip in clips]),
        )
