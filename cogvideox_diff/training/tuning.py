"""Fine-tuning a model folder on a folder of clips, from the check of everything to the adapter or the model.

Nothing is read of the weights before sizes, clips, rank and targets are known to be right. Clips and captions
are encoded once, as the verb `precompute` does, or were so before; a step reads what it needs of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from cogvideox_diff import lora
from cogvideox_diff.config import CogVideoXConfig, TransformerConfig
from cogvideox_diff.formats import ModelFolder, Parts, check_weights
from cogvideox_diff.lora_files import LORA_FILE
from cogvideox_diff.model_files import empty_net
from cogvideox_diff.pipeline import CogVideoXPipeline
from cogvideox_diff.planning import check_dtype, tasks_of
from cogvideox_diff.text_encoder import encode_prompts
from cogvideox_diff.training.finetune import (
    FinetuneConfig,
    Streamed,
    objective,
    packed_objective,
    trainable,
)
from cogvideox_diff.training.pack import PackPlan, num_tokens
from cogvideox_diff.training.precompute import (
    KIND,
    LatentClips,
    Preparation,
    check_usable,
    load_encoders,
    precompute_planned,
)
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import load_into
from shared.clips.buckets import Bucket
from shared.clips.precompute import Planned, none_left, read_index
from shared.clips.stream import BatchPlan, ClipStream
from shared.errors import BatchError, SettingError, WeightsError
from shared.model_folder import weights_mark
from shared.training import Objective, TrainConfig, recipe_of, train
from shared.training_parallel import ALONE, Parallelism, Strategy, whole_state
from shared.video import Video

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """All of one run. `data` is a folder of clips, or one that `precompute` wrote; of the former `clips` were
    looked at by `shared.clips.precompute.plan_clips`, of the latter they are empty."""

    folder: ModelFolder
    source: str  # as `CogVideoXPipeline.from_pretrained` takes it
    data: Path
    clips: tuple[Planned, ...]
    preparation: Preparation
    settings: FinetuneConfig
    train: TrainConfig
    output: Path
    cache: Path  # where clips are encoded
    dtype: torch.dtype
    tiled: bool = False
    pack_tokens: int = 0  # 0: batches of one size
    num_workers: int = 0  # processes that read ahead
    sample_prompts: tuple[str, ...] = ()
    quiet: bool = False
    strategy: Strategy = ALONE

    @property
    def sizes(self) -> dict[str, int]:
        """How many clips of which size there are, as far as one can tell before any is encoded."""
        if self.clips:
            found = [p.plan["bucket"] for p in self.clips if p.plan is not None]
        else:
            found = [row["bucket"] for row in read_index(self.data, KIND)["clips"]]
        return {size: found.count(size) for size in sorted(set(found))}

    def check(self, parallel: Parallelism) -> None:
        """Raise SettingError or WeightsError for what cannot be trained, in this way of sharing the work,
        BatchError where no clip can be used; reads no weights and asks no other process."""
        config, settings = self.folder.config, self.settings
        if settings.task == "t2v" and "t2v" not in tasks_of(config):
            raise SettingError("this model continues images: it cannot be trained for task t2v; legal: i2v")
        check_dtype(self.folder.trained_dtype, self.dtype)
        check_weights(self.folder)
        if settings.method == "lora":
            net = cast(ExpertTransformer, empty_net("transformer", config))
            lora.inject(net, settings.rank, settings.alpha, settings.targets)
        self._check_clips()
        if self.pack_tokens:
            self._check_packs(parallel)

    def _check_clips(self) -> None:
        if not self.clips:
            made_by = read_index(self.data, KIND)["settings"]["encoder"]
            if made_by != weights_mark(self.folder.path):
                warnings.warn(
                    f"{self.data} was made with other weights: it is right only if their VAE and text "
                    "encoder are this model's",
                    stacklevel=3,
                )
            return
        check_usable(self.clips)
        for planned in self.clips:
            if not planned.problem and not planned.clip.caption:
                raise SettingError(f"{planned.clip.name} in {self.data} has no caption")

    def _check_packs(self, parallel: Parallelism) -> None:
        if self.settings.task != "t2v" or parallel == "fsdp":
            raise SettingError("frame packs are for task t2v, and not with --parallel fsdp")
        for size in self.sizes:
            if (need := self.tokens_of(Bucket.parse(size))) > self.pack_tokens:
                raise SettingError(f"a clip of {size} has {need} tokens, --pack_tokens {self.pack_tokens}")

    def tokens_of(self, size: Bucket) -> int:
        """Text included."""
        net, vae = self.folder.config.transformer, self.folder.config.vae
        frames = (size.num_frames - 1) // vae.time_factor + 1
        shape = (frames, net.out_channels, size.height // vae.space_factor, size.width // vae.space_factor)
        return num_tokens(shape, net.text_len, net.patch_size)

    @property
    def widened(self) -> bool:
        """Whether a model that has only read text learns to continue images."""
        return self.settings.task == "i2v" and "i2v" not in tasks_of(self.folder.config)


def default_dtype(trained: torch.dtype, settings: FinetuneConfig, *, widened: bool) -> torch.dtype:
    """What weights are kept in: float32 where they are trained themselves; under an adapter bfloat16, unless
    the model was trained in float32 (float16 would need its losses scaled)."""
    if settings.method == "full" or widened or trained == torch.float32:
        return torch.float32
    return torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of a run, and the clips (number, name, reason) that could not be encoded or read."""

    path: Path
    skipped: tuple[dict[str, Any], ...]


def tune(job: Job) -> Tuned:
    """Train, resuming what an interrupted run left in `job.output`, and write the result: an adapter for
    diffusers and for `load_lora`, or a model folder."""
    clips = _prepared(job)
    on_gpu = job.strategy.device is not None and job.strategy.device.type == "cuda"
    pipeline = CogVideoXPipeline.from_pretrained(
        job.source,
        config=job.folder.config,
        dtype=job.dtype,
        device=str(job.strategy.device or "cpu"),
        offload="model" if on_gpu else "none",  # the text encoder is needed for sample prompts alone
        tiled=job.tiled,
    )
    _check_latents(clips, job.folder.config)
    texts = _texts(job, pipeline)
    model = trainable(pipeline.parts.transformer, job.settings, seed=job.train.seed)
    config = replace(job.folder.config, transformer=model.config)
    parts = Parts(transformer=model, vae=pipeline.parts.vae, text_encoder=pipeline.parts.text_encoder)
    pipeline = CogVideoXPipeline(
        config, parts, job.folder.tokenizer, device=pipeline.engine.device,
        offload=pipeline.engine.placement.mode, tiled=job.tiled,
    )  # fmt: skip
    stream, loss = _objective(job, pipeline, config, clips)
    said = {
        "settings": str(job.settings),
        "model": weights_mark(job.folder.path),
        "clips": [[row["key"], row["text"]] for row in clips.rows],
        "dtype": str(job.dtype),
        "pack_tokens": job.pack_tokens,
    }
    train(
        model, loss, job.train, job.output / "run", recipe=recipe_of(job.train, **said), quiet=job.quiet,
        strategy=job.strategy,
        sample=_sampler(job, pipeline, clips, texts) if job.sample_prompts else None,
    )  # fmt: skip
    unread = [
        {name: clips.rows[place][name] for name in ("number", "video")} | {"reason": reason}
        for place, reason in sorted(stream.skipped.items())
    ]
    skipped = (*(clips.skipped if job.clips else ()), *unread)
    return Tuned(path=_save(job, pipeline, model, len(clips)), skipped=skipped)


def _prepared(job: Job) -> LatentClips:
    """Clips and captions, encoded by the first process while the others wait and then read its files."""
    if not job.clips:
        return LatentClips(job.data)
    if job.strategy.is_main:
        device = job.strategy.device or torch.device("cpu")
        marks = {
            "encoder": weights_mark(job.folder.path),
            "dtype": str(job.dtype).removeprefix("torch."),
        }
        precompute_planned(
            job.clips, job.preparation, partial(load_encoders, job.folder, job.dtype, device), marks,
            job.cache, tiled=job.tiled, num_workers=job.num_workers, quiet=job.quiet,
        )  # fmt: skip
    job.strategy.wait()
    return LatentClips(job.cache)


def _check_latents(clips: LatentClips, config: CogVideoXConfig) -> None:
    if not len(clips):
        raise BatchError(none_left(clips.skipped))
    net, first = config.transformer, clips[0]
    got = (first["latents"].shape[1], *first["features"].shape)
    if got != (wanted := (net.out_channels, net.text_len, net.text_dim)):
        raise WeightsError(
            f"the clips have (channels, text length, text width) {got}, the model {wanted}: they were "
            "precomputed with another one"
        )


def _texts(job: Job, pipeline: CogVideoXPipeline) -> dict[str, Tensor]:
    """Features [L, D] of the sample prompts, and of none."""
    if not job.sample_prompts:
        return {}
    engine, prompts = pipeline.engine, ["", *job.sample_prompts]
    with engine.placement.computing(encoder := engine.text_encoder()):
        features, _ = encode_prompts(encoder, engine.tokenizer, prompts)
    return dict(zip(prompts, features, strict=True))


def _objective(
    job: Job, pipeline: CogVideoXPipeline, config: CogVideoXConfig, clips: LatentClips
) -> tuple[ClipStream, Objective]:
    """What is minimised, and the stream that it reads: batches of one size, or packs."""
    model, vae, seed = pipeline.parts.transformer, pipeline.parts.vae, job.train.seed
    plan: BatchPlan | PackPlan
    if job.pack_tokens:
        lengths = [job.tokens_of(Bucket.parse(size)) for size in clips.groups]
        plan = PackPlan(lengths, job.pack_tokens, seed)
    else:
        plan = BatchPlan(clips.groups, job.settings.batch, seed=seed, tails="fill")
    stride = job.strategy.world.degree  # micro-batches are dealt out to the processes in turn
    stream = ClipStream(samples=clips, plan=plan, stride=stride, num_workers=job.num_workers)
    nothing = clips.no_caption
    if config.sampling.unconditional == "zeros":
        nothing = torch.zeros_like(nothing)
    samples = Streamed(stream=stream, unconditional=nothing)
    if job.pack_tokens:
        return stream, packed_objective(
            model, samples, config, job.settings, seed=seed, accumulation=job.train.accumulation
        )
    if job.settings.task == "i2v" and job.strategy.device is not None:
        vae.to(job.strategy.device)  # first frames are encoded in every step, each time with other noise
    return stream, objective(
        model, vae, samples, config, job.settings, seed=seed, accumulation=job.train.accumulation
    )


def _sampler(job: Job, pipeline: CogVideoXPipeline, clips: LatentClips, texts: dict[str, Tensor]) -> Any:
    """What `train` draws: a video per sample prompt, in the size of the first clip; image to video continues
    the first clips' first frames."""
    sizes = [Bucket.parse(size) for size in clips.groups]
    frames = max(size.num_frames for size in sizes)

    def sample(model: torch.nn.Module, step: int) -> Mapping[str, Video]:
        made = {}
        for i, prompt in enumerate(job.sample_prompts):
            image = clips[i % len(clips)]["first_frame"] if job.settings.task == "i2v" else None
            made[f"prompt-{i}"] = pipeline(
                prompt, seed=i, image=image, num_frames=frames, height=sizes[0].height, width=sizes[0].width,
                prompt_embeds=texts[prompt], negative_prompt_embeds=texts[""],
            )  # fmt: skip
        return made

    return sample


def _save(job: Job, pipeline: CogVideoXPipeline, model: ExpertTransformer, num_clips: int) -> Path:
    """An adapter alone where nothing else was trained; otherwise the model in the layout it came in."""
    path = job.output / LORA_FILE if _is_adapter(job) else job.output / "model"
    if job.strategy.parallel == "fsdp":
        state = whole_state(model, job.strategy)
        if job.strategy.is_main:
            model = _whole_copy(job, model.config, state)
    if not job.strategy.is_main:
        return path
    if _is_adapter(job):
        notes = {"data": f"{num_clips} clips", "steps": str(job.train.steps), "task": job.settings.task}
        return lora.save_lora(model, job.output, notes=notes)
    lora.fuse(model)
    whole = CogVideoXPipeline(
        replace(job.folder.config, transformer=model.config),
        Parts(transformer=model, vae=pipeline.parts.vae, text_encoder=pipeline.parts.text_encoder),
        job.folder.tokenizer,
    )
    return whole.save_pretrained(path, format=job.folder.layout, dtype=job.folder.trained_dtype)


def _is_adapter(job: Job) -> bool:
    return job.settings.method == "lora" and not job.widened


def _whole_copy(job: Job, config: TransformerConfig, state: dict[str, Tensor]) -> ExpertTransformer:
    """The trained model from the tensors of all its shards."""
    net = cast(ExpertTransformer, empty_net("transformer", replace(job.folder.config, transformer=config)))
    return cast(ExpertTransformer, load_into(trainable(net, job.settings), state))
