"""Fine-tuning a model folder on a folder of clips, from the check of everything to the adapter or the model.

Nothing is read of the weights before sizes, clips, rank and targets are known to be right. Clips and captions
are encoded once; then the text encoder is not needed any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from cogvideox_diff.training.clip_latents import (
    Cache,
    Encoded,
    Fit,
    TrainClip,
    encode_clips,
    encode_texts,
    packed_samples,
    stacked_samples,
)
from cogvideox_diff.training.finetune import FinetuneConfig, objective, packed_objective, trainable
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import load_into
from shared.errors import SettingError
from shared.model_folder import weights_mark
from shared.training import Objective, TrainConfig, recipe_of, train
from shared.training_parallel import ALONE, Strategy, whole_state
from shared.video import Video

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """All of one run; `clips` were checked by `clip_latents.check_clips`."""

    folder: ModelFolder
    source: str  # as `CogVideoXPipeline.from_pretrained` takes it
    clips: tuple[TrainClip, ...]
    settings: FinetuneConfig
    train: TrainConfig
    output: Path
    cache: Path
    dtype: torch.dtype
    fit: Fit = "cover"
    tiled: bool = False
    pack_tokens: int = 0  # 0: batches of one size
    sample_prompts: tuple[str, ...] = ()
    quiet: bool = False
    strategy: Strategy = ALONE

    def check(self) -> None:
        """Raise SettingError or WeightsError for what cannot be trained; reads no weights."""
        config, settings = self.folder.config, self.settings
        if settings.task == "t2v" and "t2v" not in tasks_of(config):
            raise SettingError("this model continues images: it cannot be trained for task t2v; legal: i2v")
        check_dtype(self.folder.trained_dtype, self.dtype)
        check_weights(self.folder)
        if settings.method == "lora":
            net = cast(ExpertTransformer, empty_net("transformer", config))
            lora.inject(net, settings.rank, settings.alpha, settings.targets)
        sizes = sorted({clip.size for clip in self.clips})
        if self.pack_tokens:
            self._check_packs()
        elif len(sizes) > 1:
            raise SettingError(f"clips of {len(sizes)} sizes need frame packs: give --pack_tokens")

    def _check_packs(self) -> None:
        if self.settings.task != "t2v" or self.strategy.parallel == "fsdp":
            raise SettingError("frame packs are for task t2v, and not with --parallel fsdp")
        net, vae = self.folder.config.transformer, self.folder.config.vae
        t, h, w = net.patch_size
        for size in sorted({clip.size for clip in self.clips}):
            frames = -(-((size.num_frames - 1) // vae.time_factor + 1) // t)
            rows, columns = size.height // vae.space_factor // h, size.width // vae.space_factor // w
            need = net.text_len + math.prod((frames, rows, columns))
            if need > self.pack_tokens:
                raise SettingError(f"a clip of {size} has {need} tokens, --pack_tokens {self.pack_tokens}")

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


def tune(job: Job) -> Path:
    """Train, resuming what an interrupted run left in `job.output`, and write the result, whose path is
    returned: an adapter for diffusers and for `load_lora`, or a model folder."""
    on_gpu = job.strategy.device is not None and job.strategy.device.type == "cuda"
    pipeline = CogVideoXPipeline.from_pretrained(
        job.source,
        config=job.folder.config,
        dtype=job.dtype,
        device=str(job.strategy.device or "cpu"),
        offload="model" if on_gpu else "none",  # the text encoder leaves as soon as it has read the captions
        tiled=job.tiled,
    )
    encoded, texts = _prepared(job, pipeline)
    model = trainable(pipeline.parts.transformer, job.settings, seed=job.train.seed)
    config = replace(job.folder.config, transformer=model.config)
    parts = Parts(transformer=model, vae=pipeline.parts.vae, text_encoder=pipeline.parts.text_encoder)
    pipeline = CogVideoXPipeline(
        config, parts, job.folder.tokenizer, device=pipeline.engine.device,
        offload=pipeline.engine.placement.mode, tiled=job.tiled,
    )  # fmt: skip
    loss = _objective(job, pipeline, config, encoded, texts)
    said = {
        "settings": str(job.settings),
        "model": weights_mark(job.folder.path),
        "clips": [[item.clip.name, item.clip.caption, str(item.size)] for item in job.clips],
        "dtype": str(job.dtype),
        "fit": job.fit,
        "pack_tokens": job.pack_tokens,
    }
    train(
        model, loss, job.train, job.output / "run", recipe=recipe_of(job.train, **said), quiet=job.quiet,
        strategy=job.strategy,
        sample=_sampler(job, pipeline, encoded, texts) if job.sample_prompts else None,
    )  # fmt: skip
    return _save(job, pipeline, model)


def _prepared(job: Job, pipeline: CogVideoXPipeline) -> tuple[list[Encoded], dict[str, Tensor]]:
    """Clips and texts, encoded by the first process while the others wait and then read its files."""
    engine = pipeline.engine
    cache = Cache(folder=job.cache, model=weights_mark(job.folder.path))

    def text(prompt: str) -> Tensor:
        with engine.placement.computing(encoder := engine.text_encoder()):
            return encode_prompts(encoder, engine.tokenizer, [prompt])[0][0]

    def prepare() -> tuple[list[Encoded], dict[str, Tensor]]:
        with engine.placement.computing(pipeline.parts.vae):
            clips = encode_clips(
                job.clips, pipeline.parts.vae, cache, fit=job.fit, tiled=job.tiled, quiet=job.quiet
            )
        captions = [item.clip.caption for item in job.clips]
        return clips, encode_texts(["", *captions, *job.sample_prompts], text, cache)

    if job.strategy.is_main:
        prepare()
    job.strategy.wait()
    return prepare()


def _objective(
    job: Job,
    pipeline: CogVideoXPipeline,
    config: CogVideoXConfig,
    encoded: list[Encoded],
    texts: dict[str, Tensor],
) -> Objective:
    model, vae = pipeline.parts.transformer, pipeline.parts.vae
    nothing = torch.zeros_like(texts[""]) if config.sampling.unconditional == "zeros" else texts[""]
    if job.pack_tokens:
        packed = packed_samples(job.clips, encoded, texts, nothing)
        return packed_objective(model, packed, config, job.settings, budget=job.pack_tokens,
                                seed=job.train.seed, accumulation=job.train.accumulation)  # fmt: skip
    if job.settings.task == "i2v" and job.strategy.device is not None:
        vae.to(job.strategy.device)  # first frames are encoded in every step, each time with other noise
    samples = stacked_samples(job.clips, encoded, texts, nothing)
    return objective(model, vae, samples, config, job.settings, seed=job.train.seed,
                     accumulation=job.train.accumulation)  # fmt: skip


def _sampler(job: Job, pipeline: CogVideoXPipeline, encoded: list[Encoded], texts: dict[str, Tensor]) -> Any:
    """What `train` draws: a video per sample prompt, in the size of the first clip; image to video continues
    the first clips' first frames."""
    size = job.clips[0].size
    frames = max(item.size.num_frames for item in job.clips)

    def sample(model: torch.nn.Module, step: int) -> Mapping[str, Video]:
        made = {}
        for i, prompt in enumerate(job.sample_prompts):
            image = encoded[i % len(encoded)].first_frame if job.settings.task == "i2v" else None
            made[f"prompt-{i}"] = pipeline(
                prompt, seed=i, image=image, num_frames=frames, height=size.height, width=size.width,
                prompt_embeds=texts[prompt], negative_prompt_embeds=texts[""],
            )  # fmt: skip
        return made

    return sample


def _save(job: Job, pipeline: CogVideoXPipeline, model: ExpertTransformer) -> Path:
    """An adapter alone where nothing else was trained; otherwise the model in the layout it came in."""
    path = job.output / LORA_FILE if _is_adapter(job) else job.output / "model"
    if job.strategy.parallel == "fsdp":
        state = whole_state(model, job.strategy)
        if job.strategy.is_main:
            model = _whole_copy(job, model.config, state)
    if not job.strategy.is_main:
        return path
    if _is_adapter(job):
        notes = {"data": f"{len(job.clips)} clips", "steps": str(job.train.steps), "task": job.settings.task}
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
