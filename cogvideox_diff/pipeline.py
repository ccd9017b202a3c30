"""The whole model: prompt (and image, or video) in, video out. One class for the three tasks.

Legend: B batch, T latent frames, C latent channels, H/W latent rows/columns, L text tokens, D feature width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogvideox_diff import lora
from cogvideox_diff.acceleration import Acceleration
from cogvideox_diff.approximate import EXACT, Approximation
from cogvideox_diff.config import CogVideoXConfig, DynamicMode, SchedulerName
from cogvideox_diff.diagnostics import diagnose
from cogvideox_diff.formats import (
    Layout,
    ModelFolder,
    Parts,
    load_parts,
    load_text_encoder,
    open_folder,
    save_model,
)
from cogvideox_diff.generation import NOTHING, Batch, Callback, Engine, Given, Item
from cogvideox_diff.geometry import FitFrames
from cogvideox_diff.lora_files import LoRAReport
from cogvideox_diff.memory import Savers, advice, quantized, resolve_savers
from cogvideox_diff.planning import DEFAULTS, CallSettings, Plan, check_dtype, check_request, tasks_of
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.config_io import to_plain
from shared.errors import SettingError
from shared.memory import memory_stage
from shared.offload import OffloadMode, Placement
from shared.protocol import GenerationRequest, GenerationResult
from shared.quantize import QuantizeMode, is_quantized, quantize, quantize_mode
from shared.runtime import parse_device, parse_dtype
from shared.video import Video

OutputType = Literal["video", "latent", "pt", "np", "pil"]


@dataclass(frozen=True, kw_only=True)
class DiffusionResult(GenerationResult):
    """Also what the user should know, such as a prompt that was cut."""

    warnings: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VAECodec:
    """The VAE as the benchmark reads it: one video, no noise, latents [C, T, H, W] not scaled."""

    name: str
    vae: CausalVAE
    placement: Placement
    tiled: bool = False

    @torch.no_grad()
    def encode(self, video: Video) -> Tensor:
        """The posterior's mean. ValueError for sizes that are not 4k+1 frames and multiples of 8 pixels."""
        with self.placement.computing(self.vae) as device:
            pixels = video.to_pixels()[None].to(device, next(self.vae.parameters()).dtype)
            return self.vae.encode(pixels, tiled=self.tiled).mode()[0]

    @torch.no_grad()
    def decode(self, codes: Tensor, fps: float) -> Video:
        with self.placement.computing(self.vae) as device:
            z = codes[None].to(device, next(self.vae.parameters()).dtype)
            return Video.from_pixels(self.vae.decode(z, tiled=self.tiled)[0], fps)


class CogVideoXPipeline:
    """A loaded model. Calling it makes videos; `generate` and `settings` are the benchmark's protocol.

    `tokenizer` is a tokenizer folder or file. `offload` says where nets wait for their turn (see
    `shared.offload.Placement`); `tiled` codes large frames in blended tiles, which saves memory and changes
    them a little; `sliced` codes one video of a batch at a time, which changes nothing. All noise is drawn on
    the CPU in float32, so a seed means the same whatever the batch or the device.
    """

    def __init__(
        self,
        config: CogVideoXConfig,
        parts: Parts,
        tokenizer: Path,
        *,
        name: str = "cogvideox",
        device: torch.device | str = "cpu",
        offload: OffloadMode = "none",
        tiled: bool = False,
        sliced: bool = True,
        read_text_encoder: Callable[[], T5TextEncoder] | None = None,
    ) -> None:
        self.config, self.name = config, name
        self.tasks: frozenset[str] = frozenset(tasks_of(config))
        self.savers = Savers(offload=offload, tiled=tiled)
        self.engine = Engine(
            config,
            parts,
            Path(tokenizer),
            Placement(device, offload),
            tiled=tiled,
            sliced=sliced,
            read_text_encoder=read_text_encoder,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: CogVideoXConfig | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        offload: str = "none",
        tiled: bool | Literal["auto"] = False,
        sliced: bool = True,
        vae_chunk: str = "own",
        quantize: QuantizeMode = "none",
        savers: Savers | None = None,
        force_dtype: bool = False,
    ) -> CogVideoXPipeline:
        """Load "demo" or a folder in our layout, in diffusers' or in SAT's, told apart by content.

        `config` is for SAT folders of models that were never released: SAT's weights come without one.
        `dtype` defaults to the one that the model was trained in, `device` to the first GPU or else the CPU.
        float16 for a bfloat16 model overflows: SettingError unless `force_dtype`. WeightsError for a folder
        that is no model. Nothing is downloaded.

        Memory: `offload` "none", "model", "sequential" or "auto"; `tiled` True, False or "auto"; `vae_chunk`
        "own" or "auto"; `quantize` "none", "int8" or "fp8" (needs torchao). "auto" takes what costs least and
        fits the device's free memory at the model's native size; `savers`, from `memory.resolve_savers`,
        replaces these four. The pipeline's `savers` says what came out. OutOfMemoryError: nothing fits."""
        folder = open_folder(source, config)
        chosen = folder.trained_dtype if dtype is None else dtype
        chosen = parse_dtype(chosen) if isinstance(chosen, str) else chosen
        if not force_dtype:
            check_dtype(folder.trained_dtype, chosen)
        place = parse_device(device or "auto")
        if savers is None:
            savers = resolve_savers(
                folder.config,
                place,
                chosen,
                offload=offload,
                tiled=tiled,
                vae_chunk=vae_chunk,
                quantize=quantize,
            )
        folder = replace(folder, config=replace(folder.config, vae=savers.vae(folder.config.vae)))
        with memory_stage("loading", lambda: advice("loading", dtype=chosen)):
            parts = quantized(load_parts(folder, chosen), savers.quantize)
        pipeline = cls(
            folder.config,
            parts,
            folder.tokenizer,
            name="cogvideox-demo" if str(source) == "demo" else folder.path.resolve().name,
            device=place,
            offload=savers.offload,
            tiled=savers.tiled,
            sliced=sliced,
            read_text_encoder=partial(_read_text_encoder, folder, chosen, savers.quantize),
        )
        pipeline.savers = savers
        return pipeline

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        format: Layout = "ours",
        dtype: str | torch.dtype | None = None,
    ) -> Path:
        """Write a folder that `from_pretrained` reads; "diffusers" also loads in diffusers' pipelines, "sat"
        is as the SAT code reads it.

        `dtype` is the type on disk (default: as in memory); the present one stays the one to compute in.
        SettingError while there are adapters: `lora.fuse` or `lora.remove` says what becomes of them."""
        if names := lora.adapter_names(self.parts.transformer):
            raise SettingError(
                f"the transformer has adapters ({', '.join(names)}); fuse or remove them first"
            )
        if format not in get_args(Layout):
            raise SettingError(f"format must be one of {', '.join(get_args(Layout))}, got {format!r}")
        if is_quantized(self.parts.transformer):
            raise SettingError("the weights are quantized; save what was loaded with quantize='none'")
        self.engine.text_encoder()  # in memory again
        stored = parse_dtype(dtype) if isinstance(dtype, str) else dtype
        run, tokenizer = str(self.engine.dtype).removeprefix("torch."), self.engine.tokenizer_path
        save_model(Path(folder), format, self.config, self.parts, tokenizer, stored=stored, run=run)
        return Path(folder)

    @property
    def parts(self) -> Parts:
        """The nets, e.g. to put adapters into."""
        return self.engine.parts

    def load_lora(self, path: str | Path, *, scale: float = 1.0, name: str = "default") -> LoRAReport:
        """Put the adapter in a file or folder (diffusers, PEFT or SAT naming) on the transformer; several, of
        different names, add up. `scale` 1 is as trained, 0 is off; more in `cogvideox_diff.lora`.

        WeightsError where it fits no layer or was made for another model, SettingError for a name that is
        taken; the model then stays as it is. A part that fits nothing is a Python warning."""
        lora.check_scale(scale)
        report = lora.load_lora(self.parts.transformer, path, name=name)
        lora.set_scale(self.parts.transformer, scale, name)
        return report

    def accelerate(self, chosen: Acceleration) -> None:
        """Run the transformer so from now on, adapters included, which cannot change afterwards. SettingError
        where it does not go with the device, the pipeline's offload or several processes."""
        engine, model = self.engine, self.parts.transformer
        chosen.check(engine.device, offload=engine.placement.mode, processes=model.processes)
        engine.acceleration, engine.step = chosen, chosen.apply(model)

    @property
    def codec(self) -> VAECodec:
        engine = self.engine
        return VAECodec(
            name=f"{self.name} VAE", vae=engine.parts.vae, placement=engine.placement, tiled=engine.tiled
        )

    def settings(self, plan: Plan | None = None) -> dict[str, Any]:
        """All effective settings as JSON values: of `plan`, or of a call that sets nothing."""
        size, vae = self.config.geometry, self.config.vae
        native = {name: getattr(size, name) for name in ("num_frames", "height", "width", "fps")}
        call = native | {"negative_prompt": ""} | to_plain(self.config.sampling)
        scales, bits = lora.adapter_scales(self.parts.transformer), quantize_mode(self.parts.transformer)
        planned = {} if plan is None else plan.settings()
        left_out = planned.get("approximate", {}) | ({} if bits == "none" else {"quantize": bits})
        return {
            "family": "cogvideox_diff",
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "device": self.engine.device.type,
            "tiled": self.engine.tiled,
            "encode_frames": vae.encode_frames,
            "decode_latents": vae.decode_latents,
            **(planned or call),
            **({"approximate": left_out} if left_out else {}),
            **({"lora": scales} if scales else {}),
        }

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts that later calls will need, where that saves reading the text encoder again."""
        if self.engine.placement.mode != "none":
            with memory_stage("text", lambda: self.engine.savers("text")):
                self.engine.remember(prompts)

    # ---- calls

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        *,
        seed: int = 0,
        negative_prompt: str = "",
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        dynamic_cfg: bool | DynamicMode | None = None,
        scheduler: SchedulerName | None = None,
        num_videos_per_prompt: int = 1,
        image: object = None,
        video: Video | None = None,
        strength: float | None = None,
        fit_frames: FitFrames | None = None,
        approximation: Approximation = EXACT,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "video",
        callback_on_step_end: Callback | None = None,
    ) -> Any:
        """Make a `Video`, or a list of them for several prompts or videos per prompt; None is the model's own
        value. A prompt that is too long is cut, with a Python warning.

        `image` (uint8 [H, W, 3], an array or a PIL image) and `video` are resized to cover the size and cut.
        `fit_frames` ("nearest", "pad", "trim") makes another number of frames legal instead of refusing it.
        `latents` is the initial noise [(B,) T, C, H, W] of any task (T with padding); `prompt_embeds` the
        text features [(B,) L, D]. `approximation` saves time and makes other frames: it is not exact.
        `output_type`: "video"; "latent": float32 [T, C, H, W] without padding; "pt": float32
        [frames, 3, height, width] in 0..1; "np": the same as [frames, height, width, 3]; "pil": images.
        SettingError before any work for what the model cannot do.
        """
        settings = CallSettings(
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            dynamic_cfg=dynamic_cfg,
            scheduler=scheduler,
            strength=strength,
            fit_frames=fit_frames,
            approximation=approximation,
        )
        if output_type not in get_args(OutputType):
            legal = ", ".join(get_args(OutputType))
            raise SettingError(f"output_type must be one of {legal}, got {output_type!r}")
        pixels = None if image is None else as_image(image)
        plan = check_request(self.config, settings, image=pixels, video=video)
        prompts = _prompts(prompt, num_videos_per_prompt, prompt_embeds)
        items = [
            Item(prompt=text, seed=seed, sample=sample, image=pixels, video=video)
            for text in prompts
            for sample in range(num_videos_per_prompt)
        ]
        given = self._given(plan, len(items), latents, prompt_embeds, negative_prompt_embeds)
        batch = self.engine.run(
            items, plan, given, callback=callback_on_step_end, decoded=output_type != "latent"
        )
        for text in dict.fromkeys(text for texts in batch.warnings for text in texts):
            warnings.warn(text, stacklevel=2)
        outputs = [_output(batch, i, plan.fps, output_type) for i in range(len(items))]
        several = len(outputs) > 1 or not isinstance(prompt, str)
        return outputs if several else outputs[0]

    def generate(
        self,
        request: GenerationRequest,
        settings: CallSettings = DEFAULTS,
        *,
        callback: Callback | None = None,
        given: Given = NOTHING,
    ) -> DiffusionResult:
        """One video with its cost by stage: "text", "encode" (with an image or video), "model", "decode".
        `callback` sees every denoising step; `given` replaces what the pipeline would make itself."""
        plan = check_request(self.config, settings, image=request.image, video=request.video)
        return self._results(self.engine.run([_item(request)], plan, given, callback=callback), plan)[0]

    def generate_batch(
        self,
        requests: Sequence[GenerationRequest],
        settings: CallSettings = DEFAULTS,
        *,
        callback: Callback | None = None,
    ) -> list[DiffusionResult]:
        """The same videos as one by one, to rounding. Requests of equal task and size run together; each is
        billed an equal share of its batch's seconds, and the batch's peak."""
        plans = [check_request(self.config, settings, image=r.image, video=r.video) for r in requests]
        results: dict[int, DiffusionResult] = {}
        for plan in dict.fromkeys(plans):
            places = [i for i, other in enumerate(plans) if other == plan]
            batch = self.engine.run([_item(requests[i]) for i in places], plan, NOTHING, callback=callback)
            results |= dict(zip(places, self._results(batch, plan), strict=True))
        return [results[i] for i in range(len(requests))]

    def diagnostics(self, videos: Sequence[Video], prompts: Sequence[str]) -> dict[str, list[float]]:
        """The training loss on true clips by timestep (`cogvideox_diff.diagnostics.diagnose`)."""
        return diagnose(self.engine, videos, prompts)

    def _results(self, batch: Batch, plan: Plan) -> list[DiffusionResult]:
        assert batch.pixels is not None
        count = len(batch.pixels)
        stages = {name: replace(cost, seconds=cost.seconds / count) for name, cost in batch.stages.items()}
        return [
            DiffusionResult(
                video=Video.from_pixels(pixels, plan.fps),
                stages=stages,
                warnings=texts,
                settings=self.settings(plan),
                measured={"approximation": batch.left_out[i]} if batch.left_out else {},
            )
            for i, (pixels, texts) in enumerate(zip(batch.pixels, batch.warnings, strict=True))
        ]

    def _given(
        self, plan: Plan, count: int, noise: Tensor | None, text: Tensor | None, negative: Tensor | None
    ) -> Given:
        """Check the shapes of what a caller gave, and add or repeat the batch dimension."""
        net = self.config.transformer
        features = (net.text_len, net.text_dim)
        return Given(
            noise=_batched("latents", noise, plan.geometry.latent_shape(net.out_channels), count),
            text=_batched("prompt_embeds", text, features, count),
            negative=_batched("negative_prompt_embeds", negative, features, count),
        )


def _read_text_encoder(folder: ModelFolder, dtype: torch.dtype, mode: QuantizeMode) -> T5TextEncoder:
    return quantize(load_text_encoder(folder, dtype), mode)


def as_image(image: object) -> Tensor:
    """uint8 [H, W, 3] of a tensor, an array or a PIL image; SettingError for anything else."""
    if isinstance(image, Tensor):
        return image
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    raise SettingError(f"an image must be a tensor, an array or a PIL image, got {type(image).__name__}")


def _item(request: GenerationRequest) -> Item:
    return Item(prompt=request.prompt, seed=request.seed, image=request.image, video=request.video)


def _prompts(prompt: str | Sequence[str], count: int, features: Tensor | None) -> list[str]:
    """A prompt for every row of the features, where those are given."""
    if count < 1:
        raise SettingError(f"num_videos_per_prompt must be at least 1, got {count}; nearest: 1")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise SettingError(f"prompt must be a text or a list of texts, got {prompt!r}")
    if features is not None and features.ndim == 3 and len(prompts) == 1:
        return prompts * len(features)
    return prompts


def _batched(name: str, x: Tensor | None, shape: tuple[int, ...], count: int) -> Tensor | None:
    """`x` as [count, *shape], given so, or without the batch, or once for every video of a prompt."""
    if x is None:
        return None
    if tuple(x.shape) == shape:
        x = x[None]
    if tuple(x.shape[1:]) != shape or x.ndim == 0 or count % max(len(x), 1):
        raise SettingError(f"{name} must be {[count, *shape]} or {list(shape)}, got {list(x.shape)}")
    return x.repeat_interleave(count // len(x), dim=0)


def _output(batch: Batch, i: int, fps: float, output_type: OutputType) -> Any:
    if batch.pixels is None:
        return batch.latents[i].float().cpu()
    video = Video.from_pixels(batch.pixels[i], fps)
    if output_type == "video":
        return video
    if output_type == "pil":
        return [Image.fromarray(frame.numpy()) for frame in video.frames]
    frames = ((batch.pixels[i].float().clamp(-1, 1) + 1) / 2).cpu()  # [3, T, H, W]
    return frames.transpose(0, 1) if output_type == "pt" else frames.permute(1, 2, 3, 0).numpy()
