"""CogVideoPipeline: prompts to videos, through first frame, key frames, interpolation, super-resolution where
the model has it, and the image codec.

Legend: B samples, M frames of a video, S tokens of a frame, h/w token rows/columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_ar.config import SamplingConfig, TransformerConfig
from cogvideo_ar.diagnostics import diagnose
from cogvideo_ar.formats import open_folder
from cogvideo_ar.generation import StageSamplers, TokenSampler, build_samplers
from cogvideo_ar.interpolation import interpolate
from cogvideo_ar.keyframes import generate_first_frames, generate_keyframes
from cogvideo_ar.layout import prompt_tokens
from cogvideo_ar.options import PIXELS_PER_TOKEN, Options, Plan, resolve
from cogvideo_ar.parts import FAMILY, Parts, dtype_name, save_parts
from cogvideo_ar.super_resolution.direct import build_direct_sampler, check_texts, enlarge_videos
from cogvideo_ar.vqvae import VQVAE
from shared.config_io import to_plain
from shared.errors import OutputCheckError, SettingError
from shared.model_folder import weights_mark
from shared.protocol import GenerationRequest, GenerationResult, StageStats
from shared.runtime import StageTimer, check_finite, finite_outputs, generator, parse_device, parse_dtype
from shared.tokenizers.icetk import IceTokenizer
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
        chunks = [self.model.decode(part, PIXELS_PER_TOKEN) for part in parts]
        pixels_TCHW = check_finite("decoded frames", torch.cat(chunks))
        return Video.from_pixels(pixels_TCHW.transpose(0, 1), fps)  # [T, C, H, W] -> [C, T, H, W]

    @property
    def _device(self) -> torch.device:
        return self.model.quantizer.codebook.device


class CogVideoPipeline:
    """Text to video with CogVideo; also a `shared.protocol.VideoGenerator` whose settings are `options`.

    Weights that are not `float32` run the transformers in that dtype; the image codec stays in float32.
    `on_progress` is called with the share of the work that is done, 0..1.
    """

    name = "cogvideo"
    tasks = frozenset({"t2v"})

    def __init__(self, parts: Parts, *, options: Options | None = None, weights: str = "unsaved") -> None:
        self.parts = parts
        self.weights = weights
        self.options = options or Options()
        self.plan = resolve(parts.config, self.options)
        self.codec = VQVAECodec(parts.vqvae)
        self.on_progress: Callable[[float], None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> CogVideoPipeline:
        """`source` is "demo", a model folder, or one with the released parts (`cogvideo_ar.sat_layout`); None
        is the folder's dtype, and the first GPU or the CPU.

        Raises WeightsError where a file is missing, damaged or of another model, SettingError for a dtype or
        device that is unknown or not there.
        """
        folder = open_folder(source)
        chosen = parse_dtype(dtype) if isinstance(dtype, str) else dtype or folder.dtype
        parts = folder.load(chosen, parse_device(str(device or "auto")))
        return cls(parts, weights=weights_mark(folder.path))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write a model folder that `from_pretrained` reads; `dtype` is that of the stored weights (default:
        as they are). What the second stage shares with the first is stored once."""
        return save_parts(self.parts, Path(folder), dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.dtype

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def configured(
        self, options: Options | None = None, sampling: SamplingConfig | None = None
    ) -> CogVideoPipeline:
        """The same weights with other settings: `options` before the present ones, `sampling` instead of the
        model's."""
        config = replace(self.parts.config, sampling=sampling or self.parts.config.sampling)
        merged = self.options.merged(options or Options())
        return CogVideoPipeline(replace(self.parts, config=config), options=merged, weights=self.weights)

    def settings(self) -> dict[str, Any]:
        """Every effective setting, as JSON values."""
        clusters = self.parts.cluster_labels is not None
        return effective_settings(
            self.plan, weights=self.weights, dtype=self.dtype, device=self.device, clusters=clusters
        )

    def __call__(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_frames: int | None = None,
        fps: float | None = None,
        duration: float | None = None,
        rounds: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        coglm_temperature2: float | None = None,
        guidance_alpha: float | None = None,
    ) -> Video:
        """A video of `prompt`; None leaves a setting as it is (see `cogvideo_ar.options.Options`).

        Raises SettingError for an illegal setting and OutputCheckError where the numbers are not finite.
        """
        options = Options(
            num_frames=num_frames,
            fps=fps,
            duration=duration,
            rounds=rounds,
            temperature=temperature,
            top_k=top_k,
            coglm_temperature2=coglm_temperature2,
            guidance_alpha=guidance_alpha,
        )
        plan = resolve(self.parts.config, self.options.merged(options))
        return self._run([prompt], [seed], plan)[0].video

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """One video with the pipeline's settings, and the cost of its stages."""
        return self.generate_batch([request])[0]

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Several videos at once, each as if it were made alone; all share the seconds equally, and each
        names the peak of the whole batch."""
        if not requests:
            return []
        if any(request.image is not None or request.video is not None for request in requests):
            raise SettingError("CogVideo makes videos from text alone; legal tasks: t2v")
        return self._run([r.prompt for r in requests], [r.seed for r in requests], self.plan)

    def diagnostics(self, videos: Sequence[Video], prompts: Sequence[str]) -> dict[str, list[float]]:
        """How well the key-frame stage predicts true clips (`cogvideo_ar.diagnostics.diagnose`)."""
        return diagnose(self.parts, self.plan.sampling, videos, prompts)

    # ---- the stages

    def _run(self, prompts: list[str], seeds: list[int], plan: Plan) -> list[GenerationResult]:
        timer, parts = StageTimer(self.device), self.parts
        with timer.stage("text", unit="tokens") as stage:
            counts = check_prompts(prompts, parts.tokenizer, parts.config.keyframes, plan.sampling)
            if plan.fine_draw is not None:
                self._check_fine_texts(prompts, plan)
            stage.units = sum(counts)
        count = self._counter(len(prompts), plan)
        codes_BMhw = self._tokens(prompts, seeds, plan, timer, count)
        if plan.fine_draw is not None:
            codes_BMhw = self._enlarged(prompts, seeds, plan, timer, count, codes_BMhw)
        with timer.stage("decode", unit="frames", units=plan.num_frames * len(prompts)):
            videos = [self.codec.decode(codes, plan.fps) for codes in codes_BMhw]
        shares = {name: _share(stats, len(prompts)) for name, stats in timer.stages.items()}
        text = shares["text"]
        return [
            GenerationResult(video=video, stages={**shares, "text": replace(text, units=count)})
            for video, count in zip(videos, counts, strict=True)
        ]

    def _tokens(
        self,
        prompts: list[str],
        seeds: list[int],
        plan: Plan,
        timer: StageTimer,
        count: Callable[[float], None],
    ) -> Tensor:
        """Codes of all frames int64 [B, M, h, w]."""
        parts, config = self.parts, plan.sampling
        samplers = _watched(build_samplers(config, parts.cluster_labels), count)
        size, frame_len = len(prompts), parts.config.keyframes.frame_len
        num_keys = parts.config.keyframes.num_frames

        def streams(purpose: str) -> list[torch.Generator]:
            return [generator(seed, 0, purpose) for seed in seeds]

        def first() -> Tensor:
            arguments = (parts.tokenizer, prompts, config, samplers, streams("first_frame"))
            return generate_first_frames(parts.keyframes, *arguments)

        with timer.stage("model/first_frame", unit="tokens", units=size * frame_len):
            first_B1S = _located(parts.keyframes, first)

        def keys() -> Tensor:
            arguments = (parts.tokenizer, prompts, config, samplers, streams("keyframes"))
            return generate_keyframes(parts.keyframes, *arguments, first_B1S)

        with timer.stage("model/keyframes", unit="tokens", units=size * (num_keys - 1) * frame_len):
            frames_BMS = _located(parts.keyframes, keys)

        def between() -> Tensor:
            arguments = (parts.tokenizer, prompts, config, samplers, streams("interpolation"))
            return interpolate(parts.interpolation, *arguments, frames_BMS)

        if config.interpolation_durations:
            units = size * (plan.num_frames - num_keys) * frame_len
            with timer.stage("model/interpolation", unit="tokens", units=units):
                frames_BMS = _located(parts.interpolation, between)
        return frames_BMS.unflatten(2, parts.config.keyframes.grid)

    def _enlarged(
        self,
        prompts: list[str],
        seeds: list[int],
        plan: Plan,
        timer: StageTimer,
        count: Callable[[float], None],
        codes_BMhw: Tensor,
    ) -> Tensor:
        """Codes of the fine grid int64 [B, M, h, w]."""
        parts, model = self.parts, self.parts.super_resolution
        assert model is not None
        share = model.config.coarse_len / model.config.fine_len  # a large frame counts as much as a small one
        sampler = _Watched(
            build_direct_sampler(model.config, parts.cluster_labels), lambda tokens: count(tokens * share)
        )

        def enlarge() -> Tensor:
            streams = [generator(seed, 0, "super_resolution") for seed in seeds]
            arguments = (parts.tokenizer, prompts, plan.sampling, sampler, streams)
            return enlarge_videos(model, *arguments, codes_BMhw.flatten(2))

        units = len(prompts) * plan.num_frames * model.config.fine_len
        with timer.stage("model/super_resolution", unit="tokens", units=units):
            return _located(model, enlarge).unflatten(2, model.config.fine_grid)

    def _check_fine_texts(self, prompts: list[str], plan: Plan) -> None:
        model, template = self.parts.super_resolution, plan.sampling.prompts.super_resolution
        assert model is not None
        check_texts(model.config, [prompt_tokens(template, self.parts.tokenizer, prompt=p) for p in prompts])

    def _counter(self, size: int, plan: Plan) -> Callable[[float], None]:
        """Reports the share of tokens that are drawn."""
        passes = 1 if plan.fine_draw is None else 2
        total, drawn = size * plan.num_frames * self.parts.config.keyframes.frame_len * passes, 0.0

        def count(tokens: float) -> None:
            nonlocal drawn
            drawn += tokens
            if self.on_progress is not None:
                self.on_progress(min(round(drawn / total, 6), 1.0))

        return count


class _Watched:
    """A sampler that refuses logits which are not finite, and counts."""

    def __init__(self, sampler: TokenSampler, count: Callable[[float], None]) -> None:
        self.sampler, self.count = sampler, count

    def sample(self, logits_BV: Tensor, randomness: Tensor) -> Tensor:
        self.count(len(logits_BV))
        return self.sampler.sample(check_finite("image logits", logits_BV), randomness)


def _watched(samplers: StageSamplers, count: Callable[[float], None]) -> StageSamplers:
    return StageSamplers(
        first_frame=_Watched(samplers.first_frame, count), default=_Watched(samplers.default, count)
    )


def _located(model: nn.Module, stage: Callable[[], Tensor]) -> Tensor:
    """The stage's result; if its numbers are not finite, it runs again to name the first bad module."""
    try:
        return stage()
    except OutputCheckError:
        with finite_outputs(model):
            stage()
        raise


def _share(stats: StageStats, size: int) -> StageStats:
    return replace(stats, seconds=stats.seconds / size, units=stats.units // size)


def check_prompts(
    prompts: Sequence[str], tokenizer: IceTokenizer, model: TransformerConfig, sampling: SamplingConfig
) -> list[int]:
    """Tokens of each key-frame text. SettingError for a prompt that is empty or too long; a warning for one
    that the model was not trained for: longer than its training texts, or with unknown characters."""
    guided = sampling.guidance_alpha != 1
    templates = sampling.prompts
    key_template = templates.keyframes_guided if guided else templates.keyframes
    counts = []
    for prompt in prompts:
        if not prompt.strip():
            raise SettingError("the prompt is empty")
        tokens = prompt_tokens(key_template, tokenizer, prompt=prompt, duration=sampling.keyframe_duration)
        others = [
            len(prompt_tokens(template, tokenizer, prompt=prompt, duration=sampling.keyframe_duration))
            for template in (templates.first_frame, templates.interpolation)
        ]
        longest = max(len(tokens), *others)
        counts.append(len(tokens))
        if longest > model.image_position_offset:
            limit = model.image_position_offset
            raise SettingError(f"the prompt has {longest} tokens with its template, at most {limit} fit")
        if longest > model.max_text_len:
            trained = model.max_text_len
            warnings.warn(
                f"the prompt has {longest} tokens with its template; the model was trained on {trained}",
                stacklevel=2,
            )
        if tokenizer["<unk>"] in tokens:
            warnings.warn("the prompt has characters that the vocabulary does not know", stacklevel=2)
    return counts


def effective_settings(
    plan: Plan, *, weights: str, dtype: torch.dtype, device: torch.device, clusters: bool
) -> dict[str, Any]:
    """What `CogVideoPipeline.settings` says, without a pipeline."""
    return {
        "family": FAMILY,
        "weights": weights,
        "num_frames": plan.num_frames,
        "height": plan.height,
        "width": plan.width,
        "fps": plan.fps,
        "sampling": to_plain(plan.sampling),
        "token_clusters": clusters,
        "super_resolution": to_plain(plan.fine_draw),
        "dtype": dtype_name(dtype),
        "device": str(device),
    }
