"""How each part of CogVideo is trained: stages from a recipe and a folder to weights.

Order: the text vocabulary and the image codec; the base channel on still images (CogView2's part); key frames
(stage 1), where images go on beside the clips; interpolation (stage 2), where the base is frozen and only the
temporal channel learns, as in the release. A stage reads the folders of the earlier ones, resumes itself, and
leaves `weights.safetensors` behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cogvideo_ar.config import CogVideoConfig, TransformerConfig, cogvideo_demo
from cogvideo_ar.layout import (
    SequenceLayout,
    TrainingBatch,
    image_layout,
    interpolation_layout,
    keyframe_layout,
    pad_text,
    prompt_tokens,
    training_batch,
)
from cogvideo_ar.options import PIXELS_PER_TOKEN
from cogvideo_ar.parts import Parts
from cogvideo_ar.training.data import (
    Sample,
    TokenClips,
    duration_text,
    interpolation_sample,
    keyframe_sample,
    tokenize_shapes,
)
from cogvideo_ar.training.objective import stage_loss as stage_loss  # it is looked for here too
from cogvideo_ar.training.samples import Sampler, sampler
from cogvideo_ar.training.vqvae_objective import reconstruction_loss, vqvae_step
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import load_into, load_tensors, save_tensors
from shared.clips import shapes
from shared.clips.cache import codec_mark, codec_of
from shared.clips.stream import PixelBatches
from shared.errors import SettingError, WeightsError
from shared.json_files import read_object, shaped
from shared.losses import edge_weight
from shared.tokenizers.icetk import IceTokenizer
from shared.tokenizers.sentencepiece_training import ICETK_IDS, train_text_model
from shared.training import RECIPE, Logs, TrainConfig, recipe_of, train
from shared.training_parallel import ALONE, Strategy, whole_state

SPECIAL_TOKENS = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")
STAGES = ("tokenizer", "vqvae", "tokens", "base", "keyframes", "interpolation")
CLIP_FRAMES, CLIP_FPS = 5, 4.0  # what is read of a clip on disk for the codec
TEXT_DROPOUT = 0.1  # share of samples without a caption: what guidance calls the guider


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All stages of one preset."""

    config: CogVideoConfig
    vqvae: TrainConfig
    base: TrainConfig
    keyframes: TrainConfig
    interpolation: TrainConfig
    vqvae_batch: int = 16
    vqvae_clips: str = ""  # a list of clips whose frames the codec learns instead of the demo world's
    vqvae_workers: int = 0  # processes that decode them
    continuous_steps: int = 300  # of the codec, before it has a codebook
    image_batch: int = 32  # of the base stage
    clip_batch: int = 12
    images_beside_clips: int = 24  # of the key-frame stage
    num_clips: int = 6000
    num_stills: int = 16000
    vocab_size: int = 96
    sample_prompt: str = ""  # key frames of it are logged every `keyframes.sample_every` steps


def demo() -> Recipe:
    """Two CPU cores, about two hours in all."""
    transformer = TrainConfig(
        steps=1500,
        lr=1.5e-3,
        optimizer="muon",
        muon_lr=3e-3,
        ema_decay=0.995,
        warmup_steps=50,
        weight_decay=0.01,
        autocast="bfloat16",
    )
    return Recipe(
        config=cogvideo_demo(),
        vqvae=TrainConfig(steps=1600, lr=2e-3, optimizer="muon", muon_lr=4e-3, warmup_steps=50, log_every=10),
        base=replace(transformer, steps=1200),
        keyframes=replace(transformer, steps=2000),
        interpolation=replace(transformer, steps=700),
    )


def draw_stills(seed: int, step: int, size: int) -> Tensor:
    """Images [size, 3, H, W] of the demo world."""
    return shapes.stills(seed, step, size)[0]


def like(model: VQVAE, pixels: Tensor) -> Tensor:
    """Images where the model is, in its memory format."""
    return pixels.to(next(model.parameters()).device).to(memory_format=torch.channels_last)


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo}


@dataclass(frozen=True)
class Run:
    """A recipe at work in a folder; `quiet` hides the progress bars. With several processes in `strategy` all
    call the stages in `spread`, one the others: the codec's codebook keeps statistics batch by batch."""

    spread: ClassVar[frozenset[str]] = frozenset({"base", "keyframes", "interpolation"})

    recipe: Recipe
    folder: Path
    quiet: bool = False
    strategy: Strategy = ALONE

    def stage(self, name: str) -> None:
        """Run one stage to its end, continuing where an interrupted run left off."""
        if name not in STAGES:
            raise SettingError(f"unknown stage {name!r}; legal: {', '.join(STAGES)}, all")
        getattr(self, f"train_{name}")()

    # ---- vocabulary and codec

    def train_tokenizer(self) -> None:
        said = shapes.captions()
        train_text_model(
            [c.text for c in said] + [c.image_text for c in said],
            self.folder / "ice_text.model",
            vocab_size=self.recipe.vocab_size,
            ids=ICETK_IDS,
            user_defined_symbols=("<n>", "秒", "0.5", "1.0", "2.0", "4.0"),
            whole_words=True,
        )
        tokenizer, config = self.tokenizer(), self.recipe.config.keyframes
        wanted = {"<start_of_image>": config.start_of_image, "<pad>": config.pad_token}
        if wanted != (made := {token: tokenizer.id_of(token) for token in wanted}):
            raise SettingError(f"the vocabulary has {made}, the preset {wanted}")

    def tokenizer(self) -> IceTokenizer:
        path = self.needed("ice_text.model", "tokenizer")
        config = self.recipe.config.keyframes
        return IceTokenizer(path, num_image_tokens=config.num_image_tokens, special_tokens=SPECIAL_TOKENS)

    def train_vqvae(self) -> None:
        """Stills only. The first steps run without the codebook, which then starts from the encoder's own
        features: a codebook that starts earlier collapses to a few codes."""
        recipe, settings = self.recipe, self.recipe.vqvae
        torch.manual_seed(settings.seed)
        model = channels_last(VQVAE(recipe.config.vqvae))
        (rate,) = recipe.config.vqvae.rates
        draw = self._frames_on_disk() if recipe.vqvae_clips else draw_stills

        def objective(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            pixels = like(model, draw(settings.seed, step, recipe.vqvae_batch))
            draws = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            outlines = edge_weight(pixels)
            if step < recipe.continuous_steps:
                rebuilt = {rate: model.reconstruct_unquantized(pixels, rate)}
                return reconstruction_loss(rebuilt, pixels, pixel_weight=outlines)
            if step == recipe.continuous_steps:
                model.init_codebook(like(model, draw(settings.seed + 1, step, 256)), draws)
            restart = step % 5 == 0 and step < 0.7 * settings.steps
            return vqvae_step(
                model, pixels, generator=draws if restart else None, decay=0.98, pixel_weight=outlines
            )

        said = recipe_of(settings, batch=recipe.vqvae_batch)
        said |= {"clips": recipe.vqvae_clips} if recipe.vqvae_clips else {}
        train(model, objective, settings, self.folder / "vqvae", recipe=said, quiet=self.quiet)
        self._save(model, "vqvae")

    def _frames_on_disk(self) -> Callable[[int, int, int], Tensor]:
        """Frames of the clips on the recipe's list: of each clip another one at every step."""
        height, width = (side * PIXELS_PER_TOKEN for side in self.recipe.config.keyframes.grid)
        batches = PixelBatches(
            Path(self.recipe.vqvae_clips), (height, width), CLIP_FPS, num_workers=self.recipe.vqvae_workers
        )

        def draw(seed: int, step: int, size: int) -> Tensor:
            return batches.batch(seed, step, size, CLIP_FRAMES)[:, :, step % CLIP_FRAMES]

        return draw

    def vqvae(self) -> VQVAE:
        model = VQVAE(self.recipe.config.vqvae)
        load_into(model, load_tensors(self.needed("vqvae/weights.safetensors", "vqvae")))
        return channels_last(model).eval()

    # ---- tokens

    def train_tokens(self) -> None:
        self.clips()
        self.stills()

    def clips(self) -> TokenClips:
        path = self.folder / "tokens" / "clips.safetensors"
        return self._tokenized(path, self.recipe.num_clips, seed=1, num_frames=shapes.NUM_FRAMES)

    def stills(self) -> TokenClips:
        """First frames of other clips, for the image stage."""
        path = self.folder / "tokens" / "stills.safetensors"
        return self._tokenized(path, self.recipe.num_stills, seed=2, num_frames=1)

    def _tokenized(self, path: Path, num_clips: int, *, seed: int, num_frames: int) -> TokenClips:
        return tokenize_shapes(
            self.vqvae(), path, num_clips=num_clips, seed=seed, num_frames=num_frames, quiet=self.quiet
        )

    # ---- transformers

    def train_base(self) -> None:
        model = self._new_transformer(self.recipe.config.keyframes, self.recipe.base.seed)
        images, texts = self.stills(), self._texts(self.recipe.config.keyframes)
        for _, parameter in model.temporal_parameters():
            parameter.requires_grad = False

        def objective(step: int) -> tuple[Tensor, Logs]:
            rng = np.random.default_rng([self.recipe.base.seed, step])
            batch = texts.image_batch(images, rng, self.recipe.image_batch)
            loss, logs = stage_loss(model, batch)
            return loss, {"image": logs[0]} | _counts(batch)

        self._train(model, objective, self.recipe.base, "base", {"image_tokens": images.made_from})

    def train_keyframes(self) -> None:
        config, settings = self.recipe.config.keyframes, self.recipe.keyframes
        model = self._new_transformer(config, settings.seed)
        load_into(model, self.trained("base"))
        model.init_temporal_from_base()
        clips, images, texts = self.clips(), self.stills(), self._texts(config)

        def objective(step: int) -> tuple[Tensor, Logs]:
            rng = np.random.default_rng([settings.seed, 1, step])
            samples = [keyframe_sample(clips, rng, config.num_frames) for _ in range(self.recipe.clip_batch)]
            clip_batch = texts.clip_batch(samples, rng, keyframe_layout)
            image_batch = texts.image_batch(images, rng, self.recipe.images_beside_clips)
            video, logs = stage_loss(model, clip_batch)
            image, _ = stage_loss(model, image_batch)
            frames = {f"frame{t}": x for t, x in logs.items() if t}
            counts = _counts(clip_batch, image_batch)
            return video + image, {"image": float(image.detach())} | frames | counts

        said = {
            "clip_tokens": clips.made_from,
            "image_tokens": images.made_from,
            "images_beside": self.recipe.images_beside_clips,
        }
        self._train(model, objective, settings, "keyframes", said, sample=self._sampler(model))

    def train_interpolation(self) -> None:
        config, settings = self.recipe.config.interpolation, self.recipe.interpolation
        model = self._new_transformer(config, settings.seed)
        load_into(model, self.trained("keyframes"))
        clips, texts = self.clips(), self._texts(config)
        for _, parameter in model.base_parameters():
            parameter.requires_grad = False

        def objective(step: int) -> tuple[Tensor, Logs]:
            rng = np.random.default_rng([settings.seed, 2, step])
            samples = [
                interpolation_sample(clips, rng, config.num_frames) for _ in range(self.recipe.clip_batch)
            ]
            batch = texts.clip_batch(samples, rng, interpolation_layout)
            loss, logs = stage_loss(model, batch)
            return loss, {f"frame{t}": x for t, x in logs.items() if t % 2} | _counts(batch)

        self._train(model, objective, settings, "interpolation", {"clip_tokens": clips.made_from})

    def _new_transformer(self, config: TransformerConfig, seed: int) -> CogVideoTransformer:
        torch.manual_seed(seed)
        return CogVideoTransformer(config)

    def _texts(self, config: TransformerConfig) -> _Texts:
        return _Texts(config, self.tokenizer(), self.recipe)

    def _sampler(self, model: CogVideoTransformer) -> Sampler | None:
        if not self.recipe.sample_prompt:
            return None
        parts = Parts(
            config=self.recipe.config, keyframes=model, interpolation=model, vqvae=self.vqvae(),
            tokenizer=self.tokenizer(), text_model=b"",
        )  # fmt: skip
        return sampler(parts, 1, [self.recipe.sample_prompt], self.strategy)

    def _train(
        self,
        model: CogVideoTransformer,
        objective,
        settings: TrainConfig,
        name: str,
        said: dict[str, Any],
        *,
        sample: Sampler | None = None,
    ) -> None:
        """`said`: what else than settings and batches identifies the run: what its tokens were made from."""
        recipe = recipe_of(settings, images=self.recipe.image_batch, clips=self.recipe.clip_batch, **said)
        folder, strategy = self.folder / name, self.strategy
        train(model, objective, settings, folder, recipe=recipe, quiet=self.quiet, strategy=strategy,
              sample=sample)  # fmt: skip
        self._save(model, name)

    def _save(self, model: torch.nn.Module, name: str) -> None:
        tensors = {k: v.contiguous() for k, v in whole_state(model, self.strategy).items()}
        if self.strategy.is_main:
            save_tensors(tensors, self.folder / name / "weights.safetensors")

    def trained(self, stage: str) -> dict[str, Tensor]:
        """Weights of a transformer's stage. SettingError if they learnt the codes of another codec than the
        one that is there; recipes of before this was written down are believed."""
        weights, said = self.needed(f"{stage}/weights.safetensors", stage), self.folder / stage / RECIPE
        recipe = read_object(said, SettingError) if said.exists() else {}
        with shaped(said, SettingError):
            learnt = {codec_of(recipe[name]) for name in ("image_tokens", "clip_tokens") if name in recipe}
        if learnt and learnt != {codec_mark(self.vqvae())}:
            raise SettingError(
                f"{weights.parent} learnt the tokens of another image codec than {self.folder / 'vqvae'}: "
                "train all stages in another folder"
            )
        return load_tensors(weights)

    def needed(self, name: str, stage: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise WeightsError(f"{path} is missing: run the stage {stage!r} first")
        return path


@dataclass(frozen=True)
class _Texts:
    """Samples to training batches: captions in the templates of inference, left-padded to one length."""

    config: TransformerConfig
    tokenizer: IceTokenizer
    recipe: Recipe

    def image_batch(self, images: TokenClips, rng: np.random.Generator, size: int) -> TrainingBatch:
        picks = rng.integers(len(images), size=size)
        template = self.recipe.config.sampling.prompts.first_frame
        texts = [
            prompt_tokens(template, self.tokenizer, prompt=self._caption(images.captions[i], rng))
            for i in picks
        ]
        return self._batch(texts, images.tokens[torch.from_numpy(picks)], image_layout)

    def clip_batch(
        self,
        samples: list[Sample],
        rng: np.random.Generator,
        make_layout: Callable[[TransformerConfig, int], SequenceLayout],
    ) -> TrainingBatch:
        template = self.recipe.config.sampling.prompts.keyframes
        texts = [
            prompt_tokens(
                template,
                self.tokenizer,
                prompt=self._caption(s.caption, rng),
                duration=float(duration_text(s.stride, self.config.num_frames, shapes.FPS)),
            )
            for s in samples
        ]
        return self._batch(texts, torch.stack([s.frames for s in samples]), make_layout)

    def _caption(self, caption: shapes.Caption, rng: np.random.Generator) -> str:
        return "" if rng.random() < TEXT_DROPOUT else caption.text

    def _batch(
        self,
        texts: list[list[int]],
        frames: Tensor,
        make_layout: Callable[[TransformerConfig, int], SequenceLayout],
    ) -> TrainingBatch:
        ids, valid = pad_text(texts, self.config.pad_token, self.config.max_text_len)
        layout = make_layout(self.config, ids.shape[1])
        return training_batch(
            layout, ids, frames, start_of_image=self.config.start_of_image, text_valid_BT=valid
        )


def _counts(*batches: TrainingBatch) -> Logs:
    """Samples and learnt tokens, logged per second."""
    return {
        "samples": float(sum(len(batch.tokens) for batch in batches)),
        "tokens": float(sum(int(batch.loss_mask.sum()) for batch in batches)),
    }


def channels_last(model: VQVAE) -> VQVAE:
    """The layout in which 2D convolutions are quick, on CPUs too."""
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
