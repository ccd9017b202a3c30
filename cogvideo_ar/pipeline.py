"""CogVideoPipeline: prompts to videos, through first frame (made or given), key frames, interpolation,
super-resolution where the model has it, and the image codec.

Legend: B samples, M frames of a video, S tokens of a frame, h/w token rows/columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo_ar.clusters import clusters_mark
from cogvideo_ar.config import SamplingConfig, TransformerConfig
from cogvideo_ar.continuation import FitSize, Given, Prefix, prefix_of
from cogvideo_ar.diagnostics import diagnose
from cogvideo_ar.formats import open_folder
from cogvideo_ar.graph_step import Compile, check_compile, graph_pool
from cogvideo_ar.layout import prompt_tokens
from cogvideo_ar.memory import advice, quantized, resolve_offload
from cogvideo_ar.options import Options, Plan, resolve
from cogvideo_ar.part_paths import PartPaths
from cogvideo_ar.parts import FAMILY, Parts, dtype_name, save_parts
from cogvideo_ar.stages import Job, VQVAECodec, make_codes
from cogvideo_ar.super_resolution.direct import check_texts
from cogvideo_ar.translation import is_chinese
from shared.config_io import to_plain
from shared.errors import SettingError
from shared.memory import memory_stage
from shared.offload import Placement
from shared.protocol import GenerationRequest, GenerationResult, StageStats
from shared.quantize import QuantizeMode, check_quantize, quantize_mode
from shared.runtime import StageTimer, parse_device, parse_dtype
from shared.tokenizers.icetk import IceTokenizer
from shared.video import Video


@dataclass(frozen=True, kw_only=True)
class CogVideoResult(GenerationResult):
    """A video, and what is worth knowing of how it was made."""

    warnings: tuple[str, ...] = ()


class CogVideoPipeline:
    """Text and images to video with CogVideo; also a `shared.protocol.VideoGenerator` whose settings are
    `options`, and `given` frames and translation.

    Weights that are not `float32` run the transformers in that dtype; the image codec stays in float32.
    `placement` says where nets compute and where they wait (default: where they are), with the same results.
    `on_progress` is called with the share of the work that is done, 0..1.
    """

    name = "cogvideo"
    tasks = frozenset({"t2v", "i2v"})

    def __init__(
        self,
        parts: Parts,
        *,
        options: Options | None = None,
        given: Given | None = None,
        weights: str = "unsaved",
        placement: Placement | None = None,
    ) -> None:
        self.parts = parts
        self.placement = placement or Placement(parts.device)
        self.weights = weights
        self.given = given or Given()
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
        offload: str = "none",
        quantize: QuantizeMode = "none",
        parts: PartPaths | None = None,
    ) -> CogVideoPipeline:
        """`source` is "demo", a model folder, or one with the released parts (`cogvideo_ar.sat_layout`); None
        is the folder's dtype, and the first GPU or the CPU. `offload` "model" lets nets wait on the CPU for
        their turn, "sequential" their blocks too, "auto" as much of it as a call with default settings needs
        (see `shared.offload.Placement`); where the CPU computes, all of them are "none". `parts` are paths of
        single parts that are not in `source`.

        `quantize` "int8" or "fp8" (needs torchao) keeps the transformers' blocks in 8 bits: not exact.

        Raises WeightsError where a file is missing, damaged or of another model, SettingError for a dtype,
        device or offload that is unknown or not there, OutOfMemoryError where the weights do not fit.
        """
        folder = open_folder(source, parts)
        chosen = parse_dtype(dtype) if isinstance(dtype, str) else dtype or folder.dtype
        place, plan = parse_device(str(device or "auto")), resolve(folder.config, Options())
        mode, _ = resolve_offload(offload, folder.config, plan, chosen, place)
        check_quantize(quantize)
        on_cpu = place.type == "cpu"
        with memory_stage(
            "loading", lambda: advice("loading", offload=mode, dtype=chosen, plan=plan, on_cpu=on_cpu)
        ):
            loaded = quantized(
                folder.load(chosen, place if mode == "none" else torch.device("cpu")), quantize
            )
            placement = Placement(place, mode)
            placement.place(*loaded.nets)
        return cls(loaded, weights=folder.mark, placement=placement)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write a model folder that `from_pretrained` reads; `dtype` is that of the stored weights (default:
        as they are). What the second stage shares with the first is stored once."""
        if quantize_mode(self.parts.keyframes) != "none":
            raise SettingError("the weights are quantized; save what was loaded with quantize='none'")
        return save_parts(self.parts, Path(folder), dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.dtype

    @property
    def device(self) -> torch.device:
        return self.placement.compute

    def configured(
        self,
        options: Options | None = None,
        sampling: SamplingConfig | None = None,
        *,
        given: Given | None = None,
        clusters: Tensor | None = None,
    ) -> CogVideoPipeline:
        """The same weights with other settings: `options` before the present ones, `sampling`, `given` and
        `clusters` (a label for every image token) instead of the model's."""
        config = replace(self.parts.config, sampling=sampling or self.parts.config.sampling)
        parts = replace(self.parts, config=config)
        if clusters is not None:
            parts = replace(parts, cluster_labels=clusters)
        merged = self.options.merged(options or Options())
        return CogVideoPipeline(
            parts,
            options=merged,
            given=given or self.given,
            weights=self.weights,
            placement=self.placement,
        )

    def continuing(self, frames: Video, *, fit_size: FitSize | None = None) -> CogVideoPipeline:
        """The same pipeline, whose every video begins with these frames, as the image codec keeps them. They
        come at the rate of the key frames or of a round of interpolation, and end on a key frame."""
        given = replace(self.given, frames=frames, fit_size=fit_size or self.given.fit_size)
        return self.configured(given=given)

    def accelerate(self, compile: Compile) -> None:
        """From now on generate so: "graph" with the steps of both stages as CUDA graphs, the same function
        with other rounding. SettingError where it does not go with the device or the pipeline's offload."""
        check_compile(compile, self.device, offload=self.placement.mode)
        for model in (self.parts.keyframes, self.parts.interpolation):
            model.recorder = partial(graph_pool, self.device) if compile == "graph" else None

    def settings(self) -> dict[str, Any]:
        """Every effective setting, as JSON values."""
        labels, quantize = self.parts.cluster_labels, quantize_mode(self.parts.keyframes)
        settings = effective_settings(
            self.plan,
            weights=self.weights,
            dtype=self.dtype,
            device=self.device,
            clusters=None if labels is None else clusters_mark(labels),
        )
        if self.parts.keyframes.recorder is not None:
            settings["compile"] = "graph"
        return settings if quantize == "none" else settings | {"approximate": {"quantize": quantize}}

    def __call__(
        self,
        prompt: str,
        *,
        seed: int = 0,
        image: Tensor | None = None,
        num_frames: int | None = None,
        num_keyframes: int | None = None,
        fps: float | None = None,
        duration: float | None = None,
        rounds: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        coglm_temperature2: float | None = None,
        guidance_alpha: float | None = None,
        super_resolution: str | None = None,
    ) -> Video:
        """A video of `prompt` that begins with `image` (uint8 [H, W, 3]) if there is one; None leaves a
        setting as it is (see `cogvideo_ar.options.Options`).

        Raises SettingError for an illegal setting and OutputCheckError where the numbers are not finite.
        """
        options = Options(
            num_frames=num_frames,
            num_keyframes=num_keyframes,
            fps=fps,
            duration=duration,
            rounds=rounds,
            temperature=temperature,
            top_k=top_k,
            coglm_temperature2=coglm_temperature2,
            guidance_alpha=guidance_alpha,
            super_resolution=super_resolution,
        )
        plan = resolve(self.parts.config, self.options.merged(options))
        return self._generate([GenerationRequest(prompt=prompt, seed=seed, image=image)], plan)[0].video

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """One video with the pipeline's settings, and the cost of its stages."""
        return self.generate_batch([request])[0]

    def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Several videos at once, each as if it were made alone; those that pass the stages together share
        the seconds equally, and each names the peak of all."""
        return self._generate(requests, self.plan)

    def diagnostics(self, videos: Sequence[Video], prompts: Sequence[str]) -> dict[str, list[float]]:
        """How well the key-frame stage predicts true clips (`cogvideo_ar.diagnostics.diagnose`)."""
        with self.placement.computing(self.parts.keyframes, self.parts.vqvae):
            return diagnose(self.parts, self.plan.sampling, videos, prompts)

    # ---- the stages

    def _generate(self, requests: Sequence[GenerationRequest], plan: Plan) -> list[GenerationResult]:
        """Requests that begin with equally many given key frames pass the stages together."""
        prefixes = [prefix_of(self.parts.config, plan, request, self.given) for request in requests]
        for note in plan.notes:
            warnings.warn(note, stacklevel=3)
        counts = [prefix.num_keys for prefix in prefixes]
        results: dict[int, GenerationResult] = {}
        for num_keys in sorted(set(counts)):
            places = [place for place, count in enumerate(counts) if count == num_keys]
            chosen = [requests[place] for place in places]
            made = self._run(chosen, [prefixes[place] for place in places], plan)
            results |= dict(zip(places, made, strict=True))
        return [results[place] for place in range(len(requests))]

    def _run(
        self, requests: Sequence[GenerationRequest], prefixes: list[Prefix], plan: Plan
    ) -> list[GenerationResult]:
        timer, parts = StageTimer(self.device), self.parts
        with timer.stage("text", unit="tokens") as stage:
            prompts = [self._read(request.prompt) for request in requests]
            counts = check_prompts(prompts, parts.tokenizer, parts.config.keyframes, plan.sampling)
            if plan.fine_draw is not None:
                self._check_fine_texts(prompts, plan)
            stage.units = sum(counts)
        job = Job(
            prompts=prompts,
            seeds=[request.seed for request in requests],
            prefixes=prefixes,
            plan=plan,
            timer=timer,
            placement=self.placement,
            dtype=self.dtype,
            count=self._counter(len(prompts), plan, prefixes[0].num_keys),
        )
        codes_BMhw = make_codes(parts, self.codec, job)
        with job.stage("decode", parts.vqvae, unit="frames", units=plan.num_frames * len(prompts)):
            videos = [self.codec.decode(codes, plan.fps) for codes in codes_BMhw]
        shares = {name: _share(stats, len(prompts)) for name, stats in timer.stages.items()}
        text = shares["text"]
        said = [
            (f"translated to: {prompt}",) if prompt != request.prompt else ()
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        return [
            CogVideoResult(video=video, stages={**shares, "text": replace(text, units=count)}, warnings=notes)
            for video, count, notes in zip(videos, counts, said, strict=True)
        ]

    def _read(self, prompt: str) -> str:
        """The prompt in the model's language."""
        return prompt if self.given.translate is None else self.given.translate(prompt)

    def _check_fine_texts(self, prompts: list[str], plan: Plan) -> None:
        model, template = self.parts.super_resolution, plan.sampling.prompts.super_resolution
        assert model is not None
        check_texts(model.config, [prompt_tokens(template, self.parts.tokenizer, prompt=p) for p in prompts])

    def _counter(self, size: int, plan: Plan, num_given: int) -> Callable[[float], None]:
        """Reports the share of tokens that are drawn, or that pass a sampler without need."""
        passes = 1 + (plan.fine_draw is not None) + bool(plan.refinement)
        frames = plan.num_frames * passes - num_given
        total, drawn = size * frames * self.parts.config.keyframes.frame_len, 0.0

        def count(tokens: float) -> None:
            nonlocal drawn
            drawn += tokens
            if self.on_progress is not None:
                self.on_progress(min(round(drawn / total, 6), 1.0))

        return count


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
        if templates.language == "zh" and not is_chinese(prompt):
            warnings.warn(
                "the prompt is not Chinese, which the model was trained with; a translation (--translation) "
                "gives better videos",
                stacklevel=2,
            )
    return counts


def effective_settings(
    plan: Plan, *, weights: str, dtype: torch.dtype, device: torch.device, clusters: str | None
) -> dict[str, Any]:
    """What `CogVideoPipeline.settings` says, without a pipeline."""
    return {
        "family": FAMILY,
        "weights": weights,
        "num_frames": plan.num_frames,
        "num_keyframes": plan.num_keyframes,
        "height": plan.height,
        "width": plan.width,
        "fps": plan.fps,
        "sampling": to_plain(plan.sampling),
        "token_clusters": clusters,
        "super_resolution": to_plain(plan.fine_draw),
        "refinement": list(plan.refinement),
        "dtype": dtype_name(dtype),
        "device": str(device),
    }
