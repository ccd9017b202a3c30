"""Runs one batch through the nets: text, noise, conditions, steps, frames.

Legend: B batch, T latent frames, C latent channels, H/W latent rows/columns, L text tokens, D feature width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_diff import conditioning
from cogvideox_diff.acceleration import Acceleration
from cogvideox_diff.approximate import ApproximateTransformer, Approximation
from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.denoising import Step, denoise
from cogvideox_diff.formats import Parts
from cogvideox_diff.guidance import Predictor, make_guidance
from cogvideox_diff.memory import advice
from cogvideox_diff.planning import Plan
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.schedulers import KnownFrames, Scheduler, draw_from, draw_noise, make_scheduler
from cogvideox_diff.text_encoder import T5TextEncoder, encode_prompts
from shared.errors import SettingError
from shared.memory import memory_stage
from shared.offload import Placement
from shared.protocol import StageStats
from shared.quantize import is_quantized
from shared.runtime import Stage, StageTimer, check_finite, generator, located
from shared.tokenizers.t5 import T5Tokenizer
from shared.video import Video

Callback = Callable[[Step], None]
KEPT_PROMPTS = 256  # whose features are remembered; one of T5-XXL's is 1.8 MiB


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video of a batch; `sample` counts the videos of one prompt and seed."""

    prompt: str
    seed: int = 0
    sample: int = 0
    image: Tensor | None = None  # uint8 [H, W, 3]
    video: Video | None = None

    def random(self, stream: str) -> torch.Generator:
        return generator(self.seed, self.sample, stream)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a caller may give instead of letting the pipeline make it."""

    noise: Tensor | None = None  # [B, T, C, H, W], padding included
    text: Tensor | None = None  # [B, L, D]
    negative: Tensor | None = None  # [B, L, D] or [1, L, D]
    prefix: Tensor | None = None  # [B, t, C, H, W] or [1, ...]: scaled latents that every video begins with


NOTHING = Given()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a batch came to: final latents without padding [B, T, C, H, W], pixels [B, 3, frames, h, w] (None
    if not decoded), the cost, and per video what the user should know."""

    latents: Tensor
    pixels: Tensor | None
    stages: dict[str, StageStats]
    warnings: tuple[tuple[str, ...], ...]
    left_out: list[dict[str, Any]] = field(default_factory=list)  # per video, by approximations


class Engine:
    """The nets of one model and how they are run; `tokenizer` is a tokenizer folder or file.

    Prompts are encoded once and remembered. Where nets wait for their turn and `read_text_encoder` is given,
    the text encoder's memory is given back as soon as the prompts of a call are known."""

    def __init__(
        self,
        config: CogVideoXConfig,
        parts: Parts,
        tokenizer: Path,
        placement: Placement,
        *,
        tiled: bool = False,
        sliced: bool = True,
        read_text_encoder: Callable[[], T5TextEncoder] | None = None,
    ) -> None:
        self.config, self.parts, self.tokenizer_path = config, parts, tokenizer
        self.placement, self.tiled, self.sliced = placement, tiled, sliced
        self.read_text_encoder = read_text_encoder
        self.acceleration = Acceleration()
        self.step: Callable[..., Tensor] | None = None  # the transformer, as `Acceleration.apply` made it
        self._known: OrderedDict[str, tuple[Tensor, str]] = OrderedDict()
        placement.place(parts.transformer, parts.vae)
        placement.place(parts.text_encoder, pin=False)  # it is not needed often: let it stay a mapped file

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.transformer.proj_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.placement.compute

    @cached_property
    def tokenizer(self) -> T5Tokenizer:
        return T5Tokenizer(self.tokenizer_path, text_len=self.config.text.text_len)

    def run(
        self,
        items: Sequence[Item],
        plan: Plan,
        given: Given,
        *,
        callback: Callback | None = None,
        decoded: bool = True,
    ) -> Batch:
        self._check(plan.approximation)
        timer = StageTimer(self.device)
        with self._stage(timer, "text"):
            text, negative, cut = self._text(items, plan, given)
        noise = self._noise(items, plan, given)
        encoded = None
        if plan.task != "t2v":
            with self._stage(timer, "encode", unit="frames") as stage:
                encoded, stage.units = self._encode(items, plan)
        with self._stage(timer, "model", unit="steps", units=plan.num_steps):
            predict = self.predictor(plan, text, negative, encoded)
            scheduler, x = self._start(plan, noise, encoded, given)
            latents = self._denoise(items, plan, predict, scheduler, x, callback)
        latents = conditioning.drop_padding(latents, plan.geometry)
        pixels = None
        if decoded:
            with self._stage(timer, "decode", unit="frames") as stage:
                pixels = self._decode(latents)
                stage.units = len(pixels) * pixels.shape[2]
        model = predict.model
        left_out = model.report(len(items)) if isinstance(model, ApproximateTransformer) else []
        return Batch(latents=latents, pixels=pixels, stages=timer.stages, warnings=cut, left_out=left_out)

    def _check(self, approximation: Approximation) -> None:
        approximation.check(
            offload=self.placement.mode,
            processes=self.parts.transformer.processes,
            compile=self.acceleration.compile,
        )

    @contextmanager
    def _stage(self, timer: StageTimer, name: str, *, unit: str = "", units: int = 0) -> Iterator[Stage]:
        """A timed stage that says what to try if memory runs out in it."""
        with (
            timer.stage(name, unit=unit, units=units) as stage,
            memory_stage(name, lambda: self.savers(name)),
        ):
            yield stage

    def savers(self, stage: str) -> list[str]:
        """What is left to try if `stage` does not fit into memory."""
        return advice(
            stage,
            offload=self.placement.mode,
            tiled=self.tiled,
            dtype=self.dtype,
            quantize="int8" if is_quantized(self.parts.transformer) else "none",
            on_cpu=self.device.type == "cpu",
        )

    def _text(
        self, items: Sequence[Item], plan: Plan, given: Given
    ) -> tuple[Tensor, Tensor | None, tuple[tuple[str, ...], ...]]:
        """Features of the prompts [B, L, D], those to guide away from (None: no guidance), and warnings."""
        wanted = [] if given.text is not None else [item.prompt for item in items]
        zeros = plan.sampling.unconditional == "zeros" and not plan.negative_prompt
        encodes_negative = plan.guided and given.negative is None and not zeros
        features, tails = self._features([*wanted, plan.negative_prompt] if encodes_negative else wanted)
        text = torch.stack([features[prompt] for prompt in wanted]) if wanted else self._moved(given.text)
        cut = tuple(_cut_warning(tails.get(item.prompt, ""), text.shape[1]) for item in items)
        if not plan.guided:
            return text, None, cut
        if given.negative is not None:
            return text, self._moved(given.negative).expand_as(text), cut
        if zeros:
            return text, torch.zeros_like(text), cut
        return text, features[plan.negative_prompt].expand_as(text), cut

    def _features(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Per different prompt its features [L, D], and its end that did not fit."""
        self.remember(prompts)
        found = {prompt: self._known[prompt] for prompt in prompts}
        return {p: self._moved(x) for p, (x, _) in found.items()}, {p: tail for p, (_, tail) in found.items()}

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are not known yet, one at a time, so that features do not depend on what is
        encoded beside them; then give the text encoder's memory back, where it can be read again."""
        wanted = list(dict.fromkeys(prompts))
        if unknown := [prompt for prompt in wanted if prompt not in self._known]:
            with self.placement.computing(encoder := self.text_encoder()):
                for prompt in unknown:
                    self._known[prompt] = located(encoder, partial(self._encoded, prompt), "text_encoder")
            if self.placement.mode != "none" and self.read_text_encoder is not None:
                self.release_text_encoder()
        for prompt in wanted:
            self._known.move_to_end(prompt)
        while unknown and len(self._known) > max(KEPT_PROMPTS, len(wanted)):
            self._known.popitem(last=False)

    def _encoded(self, prompt: str) -> tuple[Tensor, str]:
        """Features [L, D] on the CPU, and the end of the prompt that did not fit."""
        features, tails = encode_prompts(self.parts.text_encoder, self.tokenizer, [prompt])
        return check_finite("text features", features)[0].cpu(), tails[0]

    def text_encoder(self) -> T5TextEncoder:
        """The text encoder, read again if its memory was given back."""
        if next(self.parts.text_encoder.parameters()).is_meta:
            assert self.read_text_encoder is not None
            self.parts = replace(self.parts, text_encoder=self.read_text_encoder())
            self.placement.place(self.parts.text_encoder, pin=False)
        return self.parts.text_encoder

    def release_text_encoder(self) -> None:
        """Give the text encoder's memory back; an unknown prompt then reads it again."""
        if self.read_text_encoder is None:
            raise SettingError("the text encoder cannot be released: it was not read from a folder")
        self.parts.text_encoder.to("meta")

    def _moved(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return x.to(self.device, self.dtype)

    def _noise(self, items: Sequence[Item], plan: Plan, given: Given) -> Tensor:
        """The initial noise in the model's type [B, T, C, H, W], padding included."""
        shape = plan.geometry.latent_shape(self.config.transformer.out_channels)
        noise = given.noise
        return self._moved(draw_noise(shape, [i.random("noise") for i in items]) if noise is None else noise)

    def _encode(self, items: Sequence[Item], plan: Plan) -> tuple[Tensor, int]:
        """Scaled latents [B, T, C, H, W] of the images or videos, and the frames read."""
        pixels = self._moved(torch.stack([_pixels(item, plan) for item in items]))
        frames = pixels.shape[2]
        shape = ((frames - 1) // self.config.vae.time_factor + 1, *self._latent_frame(plan))
        noise = draw_noise(shape, [item.random("posterior") for item in items])
        vae = self.parts.vae

        def run() -> Tensor:
            z = conditioning.encode(vae, pixels, noise, tiled=self.tiled, sliced=self.sliced)
            return check_finite("encoded frames", z)

        with self.placement.computing(vae):
            z = located(vae, run, "vae")
        if plan.task == "i2v":
            return conditioning.image_latents(z, self.config, plan.geometry), frames * len(items)
        return conditioning.clean_latents(z, self.config, plan.geometry.padding), frames * len(items)

    def _latent_frame(self, plan: Plan) -> tuple[int, int, int]:
        return self.config.vae.latent_channels, *plan.geometry.latent_size

    def predictor(
        self, plan: Plan, text: Tensor, negative: Tensor | None, encoded: Tensor | None
    ) -> Predictor:
        """The transformer, or what the plan approximates it by, with all that it is given besides the
        sample."""
        model: Callable[..., Tensor] = self.step or self.parts.transformer
        if plan.approximation.is_on:
            self._check(plan.approximation)
            model = ApproximateTransformer(self.parts.transformer, plan.approximation, plan.num_steps)
        return Predictor(
            model=model,
            text=text,
            negative=negative,
            image_latents=encoded if plan.task == "i2v" else None,
            ofs=plan.sampling.ofs if self.config.transformer.ofs_embed_dim else None,
        )

    def _start(
        self, plan: Plan, noise: Tensor, encoded: Tensor | None, given: Given
    ) -> tuple[Scheduler, Tensor]:
        """The solver, and the sample that its first step takes."""
        scheduler: Scheduler = make_scheduler(NoiseSchedule.from_config(self.config.schedule), plan.sampling)
        level = scheduler.levels.abar[plan.first_step]
        if plan.task == "v2v" and encoded is not None:
            return scheduler, conditioning.add_noise(encoded, noise, level).to(noise.dtype)
        if given.prefix is None:
            return scheduler, noise
        known = conditioning.known_frames(self._moved(given.prefix), plan.geometry)
        known = KnownFrames(scheduler, known.expand(len(noise), -1, -1, -1, -1), noise)
        return known, known.restored(noise, level)

    def _denoise(
        self,
        items: Sequence[Item],
        plan: Plan,
        predict: Predictor,
        scheduler: Scheduler,
        x: Tensor,
        callback: Callback | None,
    ) -> Tensor:
        transformer = self.parts.transformer
        with self.placement.computing(transformer):
            return denoise(
                predict,
                scheduler,
                x,
                make_guidance(plan.sampling, plan.num_steps),
                draw_from([item.random("sampler") for item in items]),
                start=plan.first_step,
                callback=callback,
                module=transformer,
                again=replace(predict, model=transformer) if predict.model is self.step else None,
            )

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.parts.vae

        def run() -> Tensor:
            frames = conditioning.decode(vae, latents, tiled=self.tiled, sliced=self.sliced)
            return check_finite("decoded frames", frames)

        with self.placement.computing(vae):
            return located(vae, run, "vae")


def _pixels(item: Item, plan: Plan) -> Tensor:
    if item.image is not None:
        return conditioning.image_pixels(item.image, plan.geometry)
    assert item.video is not None
    return conditioning.video_pixels(item.video, plan.geometry)


def _cut_warning(tail: str, text_len: int) -> tuple[str, ...]:
    return (f"the prompt exceeds {text_len} tokens; its end is not used: {tail!r}",) if tail else ()
