"""Fine-tuning a stage of a model folder on clips, or on tokens that `precompute` made of them.

As in the release the base channel stays as it is and the temporal channel learns. Stage 1 takes every clip at
the lowest frame rate that yields its five frames, stage 2 at all rates of the rounds of interpolation.

Legend: B batch, F frames, S tokens of a frame, T text tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cogvideo_ar.config import CogVideoConfig, TransformerConfig
from cogvideo_ar.formats import ModelFolder
from cogvideo_ar.layout import TrainingBatch, interpolation_layout, keyframe_layout, training_batch
from cogvideo_ar.options import PIXELS_PER_TOKEN, key_rate
from cogvideo_ar.parts import Parts, build, save_parts
from cogvideo_ar.training.objective import stage_loss
from cogvideo_ar.training.precompute import (
    KIND,
    Texts,
    TokenReader,
    TokenSamples,
    known_rates,
    load_encoders,
    precompute,
)
from cogvideo_ar.training.samples import sampler
from cogvideo_ar.transformer import CogVideoTransformer
from shared.checkpoints import load_into
from shared.clips.dataset import read_clips
from shared.clips.precompute import INDEX, none_left, read_index
from shared.clips.stream import BatchPlan, ClipStream
from shared.errors import BatchError, SettingError, WeightsError
from shared.json_files import shaped
from shared.training import Logs, Objective, TrainConfig, recipe_of, train
from shared.training_parallel import ALONE, Strategy, whole_state

Channels = Literal["temporal", "all"]
Start = Literal["model", "base"]
NETS = {1: "keyframes", 2: "interpolation"}  # of the stages, as in `Parts` and `CogVideoConfig`


@dataclass(frozen=True, kw_only=True)
class Job:
    """All of one run. `data` is a folder of clips, or one that `precompute` wrote."""

    folder: ModelFolder
    data: Path
    stage: int
    train: TrainConfig
    output: Path
    batch: int = 4
    channels: Channels = "temporal"  # what learns: the temporal channel alone, or everything
    start: Start = "model"  # "base": the temporal channel begins anew, as a copy of the base channel
    text_dropout: float = 0.1  # share of samples without a caption: what guidance calls the guider
    num_workers: int = 0  # processes that decode clips and read batches ahead
    sample_prompts: tuple[str, ...] = ()  # of the videos that are logged
    quiet: bool = False
    strategy: Strategy = ALONE

    @property
    def net(self) -> TransformerConfig:
        return getattr(self.folder.config, NETS[self.stage])

    @cached_property
    def rates(self) -> tuple[float, ...]:
        """Frame rates of the stage's samples, the lowest first."""
        config = self.folder.config
        return known_rates(config) if self.stage == 1 else round_rates(config)

    @property
    def is_precomputed(self) -> bool:
        return (self.data / INDEX).is_file()

    def check(self) -> int:
        """The number of clips. SettingError for what cannot be trained; reads no weights."""
        if self.stage not in NETS:
            raise SettingError(f"stage must be 1 or 2, got {self.stage}")
        if self.batch < 1 or not 0 <= self.text_dropout < 1:
            raise SettingError(
                f"batch must be at least 1 and text_dropout in [0, 1), got {self.batch}, {self.text_dropout}"
            )
        if self.net.temporal == "none":
            raise SettingError("the model has no temporal channel: train it on clips by the verb train")
        if not self.is_precomputed:
            return len(read_clips(self.data, must_exist=False))
        index = read_index(self.data, KIND)
        with shaped(self.data, SettingError):
            self._check_sizes(index["settings"])
            rates = {rate for row in index["clips"] for rate in row["rates"]}
        if not rates & {*self.rates}:
            raise SettingError(
                f"{self.data} has no sample at a rate of stage {self.stage} ({_listed(self.rates)}); "
                "precompute the clips with --take all"
            )
        return len(index["clips"])

    def _check_sizes(self, settings: Mapping[str, Any]) -> None:
        """Refuse tokens of another size, warn of those of another model."""
        got = tuple(settings[name] for name in ("num_frames", "height", "width"))
        wanted = (self.net.num_frames, *(side * PIXELS_PER_TOKEN for side in self.net.grid))
        if got != wanted:
            raise SettingError(f"{self.data} has (frames, height, width) {got}, the model {wanted}")
        if settings["encoder"] != self.folder.mark:
            warnings.warn(
                f"{self.data} was made with other weights: it is right only if their image codec and text "
                "model are this model's",
                stacklevel=3,
            )


def round_rates(config: CogVideoConfig) -> tuple[float, ...]:
    """Frames per second that the rounds of interpolation make, the lowest first."""
    return tuple(sorted({key_rate(config, duration) for duration in config.sampling.interpolation_durations}))


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The model folder, and the clips (number, name, reason) that could not be encoded or read."""

    path: Path
    skipped: tuple[dict[str, Any], ...]


def tune(job: Job) -> Tuned:
    """Train, resuming what an interrupted run left in `job.output`, and write the model folder. The net that
    learns is in float32, the others as their folder has them."""
    samples, texts = _prepared(job)
    parts = job.folder.load(job.folder.dtype, torch.device("cpu"))
    model = trainable(getattr(parts, NETS[job.stage]), job.channels, start=job.start, seed=job.train.seed)
    said = {
        "model": job.folder.mark,
        "stage": job.stage,
        "clips": samples.marks,
        "batch": job.batch,
        "channels": job.channels,
        "start": job.start,
        "text_dropout": job.text_dropout,
    }
    stream = streamed(samples, job)
    train(
        model, objective(model, stream, texts, job), job.train, job.output / "run",
        recipe=recipe_of(job.train, **said), quiet=job.quiet, strategy=job.strategy,
        sample=sampler(parts, job.stage, job.sample_prompts, job.strategy) if job.sample_prompts else None,
    )  # fmt: skip
    state, path = whole_state(model, job.strategy), job.output / "model"
    if job.strategy.is_main:
        net = build(CogVideoTransformer, job.net, {name: x.to(parts.dtype) for name, x in state.items()})
        save_parts(_replaced(parts, job, net), path)
    job.strategy.wait()
    left = [samples.told(place, reason) for place, reason in sorted(stream.skipped.items())]
    return Tuned(path=path, skipped=(*([] if job.is_precomputed else samples.samples.skipped), *left))


def trainable(
    net: CogVideoTransformer, channels: Channels, *, start: Start = "model", seed: int = 0
) -> CogVideoTransformer:
    """A copy in float32 of which `channels` learn and the rest is frozen. A new start copies the base
    channel's queries, keys and values; the output projection is drawn, as in the released training."""
    model = copy.deepcopy(net).float()
    if start == "base":
        torch.manual_seed(seed)
        fresh = CogVideoTransformer(net.config)
        drawn = {name: x.detach() for name, x in fresh.temporal_parameters()}
        load_into(model, model.state_dict() | drawn)
        model.init_temporal_from_base()
    learning = {name for name, _ in model.temporal_parameters()} if channels == "temporal" else None
    for name, parameter in model.named_parameters():
        parameter.requires_grad = learning is None or name in learning
    return model


@dataclass(frozen=True, kw_only=True)
class StageSamples:
    """The samples of a stage among all in a folder."""

    samples: TokenSamples
    places: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.samples[self.places[place]]

    @property
    def marks(self) -> list[Any]:
        """What tells the samples from others: content keys and rates."""
        keys = [(row["key"], rate) for row in self.samples.rows for rate in row["rates"]]
        return [list(keys[place]) for place in self.places]

    def told(self, place: int, reason: str) -> dict[str, Any]:
        """What is said of a sample that cannot be read."""
        row = [row for row in self.samples.rows for _ in row["rates"]][self.places[place]]
        return {"number": row["number"], "video": row["video"], "reason": reason}


def streamed(samples: StageSamples, job: Job) -> ClipStream:
    """Batches that worker processes read ahead; micro-batches are dealt out to the processes in turn."""
    plan = BatchPlan([job.stage] * len(samples), job.batch, seed=job.train.seed, tails="fill")
    stride = job.strategy.world.degree
    return ClipStream(samples=samples, plan=plan, stride=stride, num_workers=job.num_workers)


def objective(model: CogVideoTransformer, stream: ClipStream, texts: Texts, job: Job) -> Objective:
    """What `shared.training.train` minimises: the loss over the frames that the stage generates; logged too
    is that of every such frame."""
    generated = {time for time in range(job.net.num_frames) if (time % 2 if job.stage == 2 else time)}

    def loss(step: int) -> tuple[Tensor, Logs]:
        rng = np.random.default_rng([job.train.seed, job.stage, step])
        batch = make_batch(stream.at(step), texts, job, rng)
        mean, logs = stage_loss(model, batch)
        frames = {f"frame{time}": value for time, value in logs.items() if time in generated}
        counts = {"samples": float(job.batch), "tokens": float(batch.loss_mask.sum())}
        return mean, frames | counts

    return loss


def make_batch(rows: Mapping[str, Tensor], texts: Texts, job: Job, rng: np.random.Generator) -> TrainingBatch:
    """What the net reads of samples ("codes" [B, F, S], "rate" [B], "text" [B, T]), some of them without
    their captions."""
    net = job.net
    silent = rng.random(len(rows["rate"])) < job.text_dropout
    said = [
        texts("", [float(rate)])[0] if quiet else text.long()
        for rate, text, quiet in zip(rows["rate"], rows["text"], silent, strict=True)
    ]
    text_BT, codes_BFS = torch.stack(said), rows["codes"].long()
    layout = (keyframe_layout if job.stage == 1 else interpolation_layout)(net, text_BT.shape[1])
    return training_batch(
        layout, text_BT, codes_BFS,
        start_of_image=net.start_of_image, text_valid_BT=text_BT != net.pad_token,
    )  # fmt: skip


def _prepared(job: Job) -> tuple[StageSamples, Texts]:
    """The samples, made by the first process if they are not there yet, and texts without a caption."""
    folder, net = job.data if job.is_precomputed else job.output / "tokens", job.net
    device = job.strategy.device or torch.device("cpu")
    if not job.is_precomputed and job.strategy.is_main:
        height, width = (side * PIXELS_PER_TOKEN for side in net.grid)
        take = "lowest" if job.stage == 1 else "all"
        reader = TokenReader(
            rates=job.rates, num_frames=net.num_frames, height=height, width=width, take=take
        )
        precompute(
            read_clips(job.data, must_exist=False), reader, partial(load_encoders, job.folder, device),
            {"encoder": job.folder.mark}, folder, num_workers=job.num_workers, quiet=job.quiet,
        )  # fmt: skip
    job.strategy.wait()
    found = TokenSamples(folder)
    places = tuple(place for place, rate in enumerate(found.rates) if rate in job.rates)
    if not places:
        raise BatchError(none_left(found.skipped))
    samples = StageSamples(samples=found, places=places)
    _check_codes(samples, net)
    return samples, load_encoders(job.folder, torch.device("cpu")).texts


def _check_codes(samples: StageSamples, net: TransformerConfig) -> None:
    first = samples[0]
    if int(first["codes"].max()) >= net.num_image_tokens or len(first["text"]) != net.max_text_len:
        raise WeightsError("the tokens are not this model's: another codebook or text length")


def _replaced(parts: Parts, job: Job, net: CogVideoTransformer) -> Parts:
    return replace(parts, keyframes=net) if job.stage == 1 else replace(parts, interpolation=net)


def _listed(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
