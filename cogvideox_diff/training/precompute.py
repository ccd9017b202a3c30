"""A list of clips as the transformer's training reads it: VAE posteriors, first frames and text features.

Posterior means are kept in the VAE's own scale, without noise that would be frozen with them. Captions are
encoded once each, and the empty one for dropout.

Legend: T latent frames, C latent channels, H/W latent rows/columns, L text tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from shared.clips.dataset import Clip, Extent, even_count, even_indices, read_frames
from shared.clips.precompute import (
    Item,
    Planned,
    ShardReader,
    Shards,
    make_key,
    plan_clips,
    precompute_clips,
    read_index,
    write_index,
    write_shards,
)
from shared.errors import BatchError, SettingError, UserError
from shared.runtime import check_finite, spare_threads
from shared.tokenizers.t5 import T5Tokenizer
from shared.transforms import fit_video
from shared.video import Video

KIND, LATENTS, TEXT = "latents", "latents", "text"
FrameRule = Literal["even", "sat", "finetune"]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a clip is made to fit. `frames`: "even" takes the frames nearest to even times at `fps`, from the
    first on; "sat" and "finetune" as the released data sets do (`training.frames`), oddities and repeated
    last frames included."""

    buckets: tuple[Bucket, ...]
    fps: float
    frames: FrameRule = "even"
    rule: Rule = "aspect"

    def __post_init__(self) -> None:
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
        bucket = assign(self._count(extent), extent.height, extent.width, buckets, wanted.rule)
        plan = {"bucket": str(bucket), "num_frames": extent.num_frames, "fps": extent.fps}
        self._indices(plan)  # refuses a clip that the rule cannot sample
        return plan | losses(extent.height, extent.width, bucket)

    def read(self, clip: Clip, plan: Mapping[str, Any]) -> Video:
        bucket = Bucket.parse(plan["bucket"])
        video = read_frames(clip.video, self._indices(plan), self.preparation.fps)
        return fit_video(video, bucket.height, bucket.width)

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


@torch.no_grad()
def encode_clip(vae: CausalVAE, video: Video, *, tiled: bool = False) -> dict[str, Tensor]:
    """ "latents" [T, C, H, W], the posterior's mean in the VAE's own scale and dtype, and "first_frame" uint8
    [height, width, 3], which image-to-video training encodes with noise of its own."""
    pixels = video.to_pixels()[None].to(next(vae.parameters()))
    mean = check_finite("latents", vae.encode(pixels, tiled=tiled).mean[0])
    return {
        "latents": mean.transpose(0, 1).cpu(),
        "first_frame": video.frames[0],
    }  # [C, T, ...] -> [T, C, ...]


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
    "dtype") name the weights that `load` reads; they are read once the files have been looked at."""
    reader = LatentReader(preparation=preparation)
    planned = plan_clips(clips, reader, num_workers=num_workers, quiet=quiet)
    if all(p.problem for p in planned):
        raise BatchError(f"none of {len(planned)} clips can be used; first: {planned[0].problem}")
    settings = dict(marks) | {"fps": preparation.fps, "frames": preparation.frames, "tiled": tiled}
    encoders = load()
    encode = partial(_encode_video, encoders.vae, tiled)
    done, left, latents = precompute_clips(
        planned, reader, encode, settings, folder / LATENTS,
        per_shard=per_shard, num_workers=num_workers, quiet=quiet,
    )  # fmt: skip
    keys, text = _write_captions(planned, encoders, marks, folder / TEXT, per_shard, quiet)
    rows = [row | {"text": keys[row["caption"]]} for row in done]
    told = settings | {"sizes": [str(b) for b in preparation.buckets], "rule": preparation.rule}
    told |= {"no_caption": keys[""]}
    shards = {LATENTS: latents, TEXT: text}
    return write_index(folder, kind=KIND, settings=told, clips=rows, skipped=left, shards=shards)


def _encode_video(vae: CausalVAE, tiled: bool, video: Video) -> dict[str, Tensor]:
    return encode_clip(vae, video, tiled=tiled)


def _write_captions(
    planned: Sequence[Planned],
    encoders: Encoders,
    marks: Mapping[str, str],
    folder: Path,
    per_shard: int,
    quiet: bool,
) -> tuple[dict[str, str], Shards]:
    """The key of every different caption, "" among them, and the shards of their features."""
    captions = ["", *dict.fromkeys(p.clip.caption for p in planned if not p.problem and p.clip.caption)]
    keys = {caption: make_key(caption, dict(marks), encoders.tokenizer.text_len) for caption in captions}
    items = [Item(key=keys[caption], source=caption) for caption in captions]
    encode = partial(encode_caption, encoders.text_encoder, encoders.tokenizer)
    shards = write_shards(
        items, _caption_of, encode, folder, per_shard=per_shard, quiet=quiet, unit="caption"
    )
    if shards.skipped:
        raise UserError(f"a caption cannot be encoded: {next(iter(shards.skipped.values()))}")
    return keys, shards


def _caption_of(item: Item) -> str:
    return item.source


class LatentClips:
    """What `precompute` wrote, by number: "latents", "first_frame" and "features" of a clip.

    `groups` are the sizes, as `shared.clips.stream.BatchPlan` wants them; `no_caption` are the features of
    the empty caption [L, D]."""

    def __init__(self, folder: Path) -> None:
        index = read_index(folder, KIND)
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
        """Everything of one size (None: the only one) in memory, as fine-tuning takes it."""
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
            features=torch.stack([self._text[key]["features"] for key in number]),
            caption=torch.tensor([number[row["text"]] for row in rows]),
            unconditional=self.no_caption,
            first_frames=torch.stack([clip["first_frame"] for clip in clips]),
        )
