"""A pipeline's stages for a batch of videos, from texts and given frames to the codes of all frames.

Legend: B samples, M frames of a video, S tokens of a frame, h/w token rows/columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_ar.continuation import Prefix, known_tokens
from cogvideo_ar.generation import TokenSampler, build_samplers
from cogvideo_ar.interpolation import interpolate
from cogvideo_ar.keyframes import generate_first_frames, generate_keyframes
from cogvideo_ar.memory import advice
from cogvideo_ar.options import PIXELS_PER_TOKEN, Plan
from cogvideo_ar.parts import Parts
from cogvideo_ar.super_resolution.direct import build_direct_sampler, enlarge_videos
from cogvideo_ar.super_resolution.iterative import build_pass_samplers, refine_videos, refined_cells
from cogvideo_ar.vqvae import VQVAE
from shared.memory import memory_stage
from shared.offload import Placement
from shared.runtime import StageTimer, check_finite, generator, located
from shared.video import Video

CODEC_FRAMES = 16  # that pass the image codec together


class VQVAECodec:
    """The image codec as a video codec: every frame alone; codes int64 [T, h, w]."""

    name = "vqvae"

    def __init__(self, model: VQVAE) -> None:
        self.model = model

    def encode(self, video: Video) -> Tensor:
        """Codes int64 [T, h, w] on the CPU."""
        pixels_TCHW = video.to_pixels().transpose(0, 1).to(self._device)  # [C, T, H, W] -> [T, C, H, W]
        chunks = [self.model.encode(part, PIXELS_PER_TOKEN) for part in pixels_TCHW.split(CODEC_FRAMES)]
        return torch.cat(chunks).cpu()

    def decode(self, codes: Tensor, fps: float) -> Video:
        """Codes [T, h, w] -> frames; OutputCheckError where they are not finite."""
        parts = codes.to(self._device).split(CODEC_FRAMES)

        def run() -> Tensor:
            chunks = [self.model.decode(part, PIXELS_PER_TOKEN) for part in parts]
            return check_finite("decoded frames", torch.cat(chunks))

        pixels_TCHW = located(self.model, run, "vqvae")
        return Video.from_pixels(pixels_TCHW.transpose(0, 1), fps)  # [T, C, H, W] -> [C, T, H, W]

    @property
    def _device(self) -> torch.device:
        return self.model.quantizer.codebook.device


@dataclass(frozen=True, kw_only=True)
class Job:
    """Videos that pass the stages together: they begin with as many given key frames."""

    prompts: list[str]
    seeds: list[int]
    prefixes: list[Prefix]
    plan: Plan
    timer: StageTimer
    placement: Placement
    dtype: torch.dtype
    count: Callable[[float], None]

    @contextmanager
    def stage(self, name: str, net: nn.Module, *, unit: str, units: int) -> Iterator[None]:
        """A timed stage that has `net` on the computing device, and says what to try if memory runs out."""
        with (
            self.timer.stage(name, unit=unit, units=units),
            memory_stage(name, lambda: self.savers(name)),
            self.placement.computing(net),
        ):
            yield

    def savers(self, stage: str) -> list[str]:
        """What is left to try if `stage` does not fit into memory."""
        on_cpu = self.placement.compute.type == "cpu"
        return advice(stage, offload=self.placement.mode, dtype=self.dtype, plan=self.plan, on_cpu=on_cpu)

    @property
    def size(self) -> int:
        return len(self.prompts)

    def streams(self, purpose: str) -> list[torch.Generator]:
        """One CPU generator per video, of this purpose alone."""
        return [generator(seed, 0, purpose) for seed in self.seeds]


def make_codes(parts: Parts, codec: VQVAECodec, job: Job) -> Tensor:
    """Codes of all frames of all videos, on the fine grid where the plan enlarges: int64 [B, M, h, w]."""
    codes_BMhw = _tokens(parts, codec, job)
    if job.plan.fine_draw is not None:
        codes_BMhw = _enlarged(parts, job, codes_BMhw)
    return _refined(parts, job, codes_BMhw) if job.plan.refinement else codes_BMhw


def _tokens(parts: Parts, codec: VQVAECodec, job: Job) -> Tensor:
    """Codes of all frames int64 [B, M, h, w]."""
    plan = job.plan
    samplers = replace(build_samplers(plan.sampling, parts.cluster_labels), count=job.count)
    known_BMS, num_given = _known(parts, codec, job), job.prefixes[0].num_keys
    frames_BMS = known_BMS[:, :: plan.key_distance][:, :num_given]
    missing = plan.num_keyframes - max(num_given, 1)
    frame_units = job.size * parts.config.keyframes.frame_len

    def arguments(purpose: str) -> tuple[Any, ...]:
        return (parts.tokenizer, job.prompts, plan.sampling, samplers, job.streams(purpose))

    def first() -> Tensor:
        return generate_first_frames(parts.keyframes, *arguments("first_frame"))

    def keys() -> Tensor:
        return generate_keyframes(
            parts.keyframes,
            *arguments("keyframes"),
            given_BGS=frames_BMS,
            num_frames=plan.num_keyframes,
        )

    def between() -> Tensor:
        return interpolate(
            parts.interpolation,
            *arguments("interpolation"),
            frames_BMS=frames_BMS,
            known_BMS=known_BMS,
        )

    if not num_given:
        with job.stage("model/first_frame", parts.keyframes, unit="tokens", units=frame_units):
            frames_BMS = located(parts.keyframes, first, "keyframes")
    if missing:
        with job.stage("model/keyframes", parts.keyframes, unit="tokens", units=missing * frame_units):
            frames_BMS = located(parts.keyframes, keys, "keyframes")
    if plan.num_rounds:
        units = job.size * (plan.num_frames - plan.num_keyframes) * parts.config.keyframes.frame_len
        with job.stage("model/interpolation", parts.interpolation, unit="tokens", units=units):
            frames_BMS = located(parts.interpolation, between, "interpolation")
    return frames_BMS.unflatten(2, parts.config.keyframes.grid)


def _known(parts: Parts, codec: VQVAECodec, job: Job) -> Tensor:
    """Tokens of the given frames in the finished videos [B, M, S], -1 elsewhere."""
    grid = parts.config.keyframes.grid
    codes = [torch.empty(0, *grid, dtype=torch.long)] * job.size
    if job.prefixes[0].num_keys:
        units = sum(len(prefix.frames) for prefix in job.prefixes if prefix.frames is not None)
        with job.stage("encode", parts.vqvae, unit="frames", units=units):
            codes = [
                codec.encode(Video(frames=prefix.frames, fps=job.plan.fps))
                for prefix in job.prefixes
                if prefix.frames is not None
            ]
    return known_tokens(job.prefixes, codes, job.plan, grid[0] * grid[1]).to(job.placement.compute)


def _enlarged(parts: Parts, job: Job, codes_BMhw: Tensor) -> Tensor:
    """Codes of the fine grid int64 [B, M, h, w]."""
    model = parts.super_resolution
    assert model is not None
    share = model.config.coarse_len / model.config.fine_len  # a large frame counts as much as a small one
    sampler = _Counted(
        build_direct_sampler(model.config, parts.cluster_labels), lambda tokens: job.count(tokens * share)
    )

    def enlarge() -> Tensor:
        arguments = (parts.tokenizer, job.prompts, job.plan.sampling, sampler)
        return enlarge_videos(model, *arguments, job.streams("super_resolution"), codes_BMhw.flatten(2))

    units = job.size * job.plan.num_frames * model.config.fine_len
    with job.stage("model/super_resolution", model, unit="tokens", units=units):
        return located(model, enlarge, "super_resolution").unflatten(2, model.config.fine_grid)


def _refined(parts: Parts, job: Job, codes_BMhw: Tensor) -> Tensor:
    """Codes of the same grid, those of the higher levels drawn anew pass by pass."""
    model = parts.refinement
    assert model is not None
    cells = sum(refined_cells(model.config))
    share = parts.config.keyframes.frame_len / cells
    samplers = [
        _Counted(sampler, lambda tokens: job.count(tokens * share))
        for sampler in build_pass_samplers(model.config)
    ]

    def refine() -> Tensor:
        arguments = (parts.tokenizer, job.prompts, job.plan.sampling, samplers)
        return refine_videos(model, *arguments, job.streams("refinement"), codes_BMhw.flatten(2))

    units = job.size * job.plan.num_frames * cells
    with job.stage("model/refinement", model, unit="tokens", units=units):
        return located(model, refine, "refinement").unflatten(2, model.config.fine_grid)


class _Counted:
    """A sampler that tells how many tokens it has drawn."""

    def __init__(self, sampler: TokenSampler, count: Callable[[float], None]) -> None:
        self.sampler, self.count = sampler, count

    def sample(self, logits_BV: Tensor, randomness: Tensor) -> Tensor:
        self.count(len(logits_BV))
        return self.sampler.sample(logits_BV, randomness)
