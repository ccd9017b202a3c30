"""A list of clips as the transformers' training reads it: image tokens at frame rates that fit, and texts.

Hierarchical frame rates (paper section 3.1): of the predefined rates a clip takes the lowest at which it
still yields enough frames; the text begins with the time that these frames span.

Legend: R rates, F frames of a sample, S tokens of a frame, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cogvideo_ar.config import CogVideoConfig
from cogvideo_ar.formats import ModelFolder
from cogvideo_ar.layout import PromptTokenizer, pad_text, prompt_tokens
from cogvideo_ar.options import PIXELS_PER_TOKEN, key_rate, known_durations
from cogvideo_ar.parts import build, load_tokenizer
from cogvideo_ar.vqvae import VQVAE
from shared.clips.dataset import SLACK, Clip, Extent, even_count, even_indices, read_frames
from shared.clips.precompute import (
    ShardReader,
    none_left,
    plan_clips,
    precompute_clips,
    read_index,
    write_index,
)
from shared.errors import BatchError, SettingError
from shared.runtime import spare_threads
from shared.transforms import fit_video
from shared.video import Video

KIND = "tokens"
Take = Literal["lowest", "all"]


def known_rates(config: CogVideoConfig) -> tuple[float, ...]:
    """Frames per second of the frame-rate tokens that the model knows, the lowest first."""
    return tuple(sorted(key_rate(config, duration) for duration in known_durations(config.sampling)))


def fitting_rates(extent: Extent, count: int, rates: Sequence[float]) -> tuple[float, ...]:
    """Rates at which the clip yields `count` frames, none of them twice, the lowest first. SettingError where
    there is none."""
    fitting = [
        rate
        for rate in sorted(rates)
        if extent.fps * SLACK >= rate and even_count(extent.num_frames, extent.fps, rate) >= count
    ]
    if not fitting:
        legal = ", ".join(f"{rate:g}" for rate in sorted(rates))
        raise SettingError(
            f"{extent.num_frames} frames at {extent.fps:g} per second do not yield {count} at any of {legal}"
        )
    return tuple(fitting)


@dataclass(frozen=True, kw_only=True)
class TokenReader:
    """Clips to the pixels of a sample's frames at each of its rates."""

    rates: tuple[float, ...]
    num_frames: int
    height: int  # pixels
    width: int
    take: Take = "lowest"

    def __post_init__(self) -> None:
        if self.take not in get_args(Take):
            raise SettingError(f"take must be one of {', '.join(get_args(Take))}, got {self.take!r}")
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise SettingError(f"rates must be positive and at least one, got {list(self.rates)}")

    def plan(self, clip: Clip, extent: Extent) -> dict[str, Any]:
        rates = fitting_rates(extent, self.num_frames, self.rates)
        rates = rates[:1] if self.take == "lowest" else rates
        about = {"num_frames": extent.num_frames, "fps": extent.fps}
        return {"rates": list(rates), "caption": clip.caption, **about}  # its tokens lie beside the clip's

    def read(self, clip: Clip, plan: Mapping[str, Any]) -> tuple[list[Video], str]:
        """A video per rate, and the caption."""
        videos = []
        for rate in plan["rates"]:
            indices = even_indices(plan["fps"], rate, self.num_frames)
            videos.append(fit_video(read_frames(clip.video, indices, rate), self.height, self.width))
        return videos, clip.caption


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Captions behind their frame-rate tokens, as the key-frame stage reads them."""

    config: CogVideoConfig
    tokenizer: PromptTokenizer

    def __call__(self, caption: str, rates: Sequence[float]) -> Tensor:
        """int64 [R, T], padded on the left to the model's text length; what is longer loses its end."""
        net, template = self.config.keyframes, self.config.sampling.prompts.keyframes
        rows = [
            prompt_tokens(template, self.tokenizer, prompt=caption, duration=(net.num_frames - 1) / rate)[
                : net.max_text_len
            ]
            for rate in rates
        ]
        return pad_text(rows, net.pad_token, net.max_text_len)[0]


@torch.no_grad()
def encode_frames(vqvae: VQVAE, texts: Texts, given: tuple[Sequence[Video], str]) -> dict[str, Tensor]:
    """ "codes" int32 [R, F, S], "rates" float32 [R] and "text" int32 [R, T]."""
    videos, caption = given
    device = vqvae.quantizer.codebook.device
    codes = []
    for video in videos:
        pixels = video.to_pixels().transpose(0, 1).to(device)  # [C, F, H, W] -> [F, C, H, W]
        codes.append(vqvae.encode(pixels, PIXELS_PER_TOKEN).flatten(1).to(torch.int32).cpu())
    rates = [video.fps for video in videos]
    text = texts(caption, rates).to(torch.int32)
    return {"codes": torch.stack(codes), "rates": torch.tensor(rates, dtype=torch.float32), "text": text}


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What turns clips into tokens."""

    vqvae: VQVAE
    texts: Texts


def load_encoders(folder: ModelFolder, device: torch.device) -> Encoders:
    """Those of a model, without its transformers; the codec in float32."""
    config, tensors = folder.config, folder.codec()
    whole = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    vqvae = build(VQVAE, config.vqvae, whole).to(device)
    spare_threads(vqvae)
    tokenizer = load_tokenizer(folder.text_model, config.keyframes.num_image_tokens)
    return Encoders(vqvae=vqvae, texts=Texts(config=config, tokenizer=tokenizer))


def precompute(
    clips: Sequence[Clip],
    reader: TokenReader,
    load: Callable[[], Encoders],
    marks: Mapping[str, str],
    folder: Path,
    *,
    per_shard: int = 256,
    num_workers: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Encode all clips into `folder` and write its index, which is returned. `marks` ("encoder") name the
    weights that `load` reads; they are read once the files have been looked at."""
    planned = plan_clips(clips, reader, num_workers=num_workers, quiet=quiet)
    if all(p.problem for p in planned):
        raise BatchError(none_left([{"reason": p.problem} for p in planned]))
    settings = dict(marks) | {"num_frames": reader.num_frames, "height": reader.height, "width": reader.width}
    encoders = load()
    encode = partial(encode_frames, encoders.vqvae, encoders.texts)
    done, left, shards = precompute_clips(
        planned, reader, encode, settings, folder / KIND,
        per_shard=per_shard, num_workers=num_workers, quiet=quiet,
    )  # fmt: skip
    told = settings | {"predefined_rates": list(reader.rates), "take": reader.take}
    return write_index(folder, kind=KIND, settings=told, clips=done, skipped=left, shards={KIND: shards})


class TokenSamples:
    """What `precompute` wrote, a sample per clip and rate: "codes" [F, S], "rate" [], "text" [T].

    All samples have one size, so that `groups` is the same for all; `rates` tells them apart."""

    def __init__(self, folder: Path) -> None:
        index = read_index(folder, KIND)
        self.skipped: list[dict[str, Any]] = index["skipped"]
        self.rows: list[dict[str, Any]] = index["clips"]
        self._places = [(row["key"], i) for row in self.rows for i in range(len(row["rates"]))]
        self.rates = [rate for row in self.rows for rate in row["rates"]]
        self.groups = [KIND] * len(self._places)
        self._shards = ShardReader(folder / KIND, index["shards"][KIND])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        key, i = self._places[place]
        sample = self._shards[key]
        return {"codes": sample["codes"][i], "rate": sample["rates"][i], "text": sample["text"][i]}
