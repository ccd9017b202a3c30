"""How each part of CogVideoX is trained: stages from a recipe and a folder to weights.

Order: the text vocabulary; the VAE, on single frames first and then on clips; the expert transformer with the
small text encoder, on stills alone first and then on clips and stills together (paper section 3.1: joint
image and video training); last, an adapter that lets it continue an image. A stage reads the folders of the
earlier ones, resumes itself, and leaves `weights.safetensors` behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cogvideox_diff import lora
from cogvideox_diff.config import CogVideoXConfig, cogvideox_demo
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.text_encoder import T5TextEncoder
from cogvideox_diff.training.data import (
    LatentClips,
    clearest,
    encode_shapes,
    pixel_batch,
    unit_scale,
)
from cogvideox_diff.training.finetune import FinetuneConfig, Samples, objective, trainable
from cogvideox_diff.training.objective import diffusion_loss, loss_by_timestep, summed
from cogvideox_diff.training.pack import num_tokens, packed_loss
from cogvideox_diff.training.samples import recipe_sampler
from cogvideox_diff.training.timesteps import WHOLE, Share
from cogvideox_diff.training.vae_gan import AdversarialVAE, GanConfig
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.checkpoints import load_into, load_tensors, save_tensors
from shared.clips import shapes
from shared.clips.stream import PixelBatches
from shared.errors import SettingError, WeightsError
from shared.losses import edge_weight
from shared.tokenizers.sentencepiece_training import T5_IDS, train_text_model
from shared.tokenizers.t5 import T5Tokenizer
from shared.training import Logs, Objective, TrainConfig, recipe_of, train
from shared.training_parallel import ALONE, Strategy, whole_state
from shared.video import Video

STAGES = ("tokenizer", "vae", "latents", "transformer", "image_to_video")
OPTIONAL = ("quality",)  # stages that "all" leaves out
KL = 1e-5
CLIP_SEED = 1
TEXT_DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Phase:
    """From the share `begin` of all steps on: batches of so many clips of so many frames."""

    begin: float
    num_frames: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """From the share `begin` of the transformer's steps on: clips of `size` x `size` pixels."""

    begin: float
    size: int
    num_frames: int = shapes.NUM_FRAMES


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All stages of one preset.

    `resolutions`, smallest first, make the transformer's training progressive (none: full size all the time).
    `pack` puts clips and stills of a step into one frame pack, where every sample counts alike. The stage
    "quality" goes on from the transformer with the clearest `quality_share` of the clips and a low rate."""

    config: CogVideoXConfig
    vae: TrainConfig
    vae_phases: tuple[Phase, ...]
    transformer: TrainConfig
    vae_clips: str = ""  # a list of clips that the codec learns instead of the demo world
    vae_workers: int = 0  # processes that decode them
    sample_prompt: str = ""  # a video of it is logged every `transformer.sample_every` steps
    clip_batch: int = 20
    still_batch: int = 20
    still_steps: int = 600  # first steps, which see stills alone, in batches three times as large
    num_clips: int = 6000
    num_stills: int = 12000
    vocab_size: int = 96
    vae_gan: GanConfig = field(default_factory=GanConfig)
    resolutions: tuple[Resolution, ...] = ()
    pack: bool = False
    quality_share: float = 0.25
    quality: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=600, lr=1e-4, warmup_steps=20, decay_fraction=1.0, ema_decay=0.99, autocast="bfloat16"
        )
    )
    image_to_video: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(
            task="i2v",
            rank=8,
            alpha=16.0,
            targets=(*lora.TARGETS, "mlp.fc1", "mlp.fc2"),
            batch=16,
        )
    )
    image_to_video_train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500, lr=2e-3, ema_decay=0.99, autocast="bfloat16", decay_fraction=0.5
        )
    )


def demo() -> Recipe:
    """Two CPU cores, about two hours in all."""
    return Recipe(
        config=cogvideox_demo(),
        vae=TrainConfig(
            steps=1500,
            lr=2e-3,
            optimizer="muon",
            muon_lr=4e-3,
            warmup_steps=50,
            ema_decay=0.995,
            autocast="bfloat16",
            log_every=10,
            save_every=100,
        ),
        vae_phases=(
            Phase(begin=0.0, num_frames=1, batch=24),
            Phase(begin=0.4, num_frames=9, batch=5),
            Phase(begin=0.67, num_frames=17, batch=3),
        ),
        transformer=TrainConfig(
            steps=12000,
            decay_fraction=0.75,
            lr=1.5e-3,
            optimizer="muon",
            muon_lr=3e-3,
            weight_decay=0.01,
            ema_decay=0.998,
            autocast="bfloat16",
            log_every=20,
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo}


class JointModel(nn.Module):
    """The two nets that learn together at demo size (the released models keep T5 frozen)."""

    def __init__(self, config: CogVideoXConfig, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.text_encoder = T5TextEncoder(config.text)
        self.transformer = ExpertTransformer(config.transformer)
        self.transformer.init_weights(torch.Generator().manual_seed(seed), zero_modulation=True)


@dataclass(frozen=True)
class Run:
    """A recipe at work in a folder; `quiet` hides the progress bars. With several processes in `strategy` all
    call the stages in `spread`, one the others."""

    spread: ClassVar[frozenset[str]] = frozenset({"vae", "transformer", "quality", "image_to_video"})

    recipe: Recipe
    folder: Path
    quiet: bool = False
    strategy: Strategy = ALONE

    def stage(self, name: str) -> None:
        """Run one stage to its end, continuing where an interrupted run left off."""
        if name not in (*STAGES, *OPTIONAL):
            raise SettingError(f"unknown stage {name!r}; legal: {', '.join((*STAGES, *OPTIONAL))}, all")
        getattr(self, f"train_{name}")()

    # ---- vocabulary and codec

    def train_tokenizer(self) -> None:
        said = shapes.captions()
        train_text_model(
            [c.text for c in said] + [c.image_text for c in said],
            self.folder / "tokenizer" / "spiece.model",
            vocab_size=self.recipe.vocab_size,
            ids=T5_IDS,
            whole_words=True,
        )
        needed, rows = self.tokenizer().num_tokens, self.recipe.config.text.vocab_size
        if needed > rows:
            raise SettingError(f"the vocabulary has {needed} entries, the preset's text encoder {rows}")

    def tokenizer(self) -> T5Tokenizer:
        path = self.needed("tokenizer/spiece.model", "tokenizer")
        return T5Tokenizer(path.parent, text_len=self.recipe.config.text.text_len)

    def train_vae(self) -> None:
        """Single frames first, then longer and longer clips: a frame costs a 17th of a clip and teaches
        outlines and colours as well."""
        settings, phases, config = self.recipe.vae, self.recipe.vae_phases, self.recipe.config.vae
        device = self.strategy.device or torch.device("cpu")
        torch.manual_seed(settings.seed)
        model = CausalVAE(config)
        bias = model.encoder.conv_out.conv.bias
        assert bias is not None
        with (
            torch.no_grad()
        ):  # nearly no noise at first: at variance 1 nothing passes the bottleneck for long
            bias[config.latent_channels :] = -6
        draw = self._clips_on_disk().batch if self.recipe.vae_clips else pixel_batch
        gan = self.recipe.vae_gan
        judged = AdversarialVAE(model, gan) if gan.active else None
        if judged is not None and self.strategy.parallel == "fsdp":
            raise SettingError("the adversarial loss needs whole layers: --parallel none or ddp")

        def loss(step: int) -> tuple[Tensor, Logs]:
            done = step // settings.accumulation
            phase = next(p for p in reversed(phases) if done >= p.begin * settings.steps)
            pixels = draw(settings.seed, step, phase.batch, phase.num_frames).to(device)
            posterior = model.encode(pixels)
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            decoded = model.decode(posterior.sample(noise.to(device)))
            if judged is not None:
                value, logs = judged.loss(pixels, decoded, posterior, done, step % phase.num_frames)
                return value, logs | {"samples": phase.batch}
            difference = decoded.float() - pixels
            error = (edge_weight(pixels) * (difference.abs() + difference.square())).mean()
            kl = posterior.kl() / posterior.mean[0].numel()
            psnr = 10 * torch.log10(4 / difference.detach().square().mean())
            figures = {
                "psnr": float(psnr),
                "kl": float(kl.detach()),
                "latent_std": float(posterior.mean.detach().std()),
                "samples": phase.batch,
            }
            return error + KL * kl, figures

        # its blocks are not functions of their arguments: a clip's context remembers its last piece
        plain = replace(self, strategy=replace(self.strategy, activation_checkpointing="none"))
        said = {"phases": str(phases)} | ({"gan": str(gan)} if gan.active else {})
        said |= {"clips": self.recipe.vae_clips} if self.recipe.vae_clips else {}
        plain._train(judged or model, loss, settings, "vae", said, kept=model)

    def _clips_on_disk(self) -> PixelBatches:
        size, recipe = self.recipe.config.geometry, self.recipe
        return PixelBatches(
            Path(recipe.vae_clips), (size.height, size.width), float(size.fps),
            stride=self.strategy.world.degree, num_workers=recipe.vae_workers,
        )  # fmt: skip

    def vae(self) -> CausalVAE:
        model = CausalVAE(self.recipe.config.vae)
        load_into(model, load_tensors(self.needed("vae/weights.safetensors", "vae")))
        return model.eval()

    # ---- latents

    def train_latents(self) -> None:
        self.clips()
        self.stills()

    def clips(self) -> LatentClips:
        path = self.folder / "latents" / "clips.safetensors"
        return self._encoded(path, self.recipe.num_clips, seed=CLIP_SEED, num_frames=shapes.NUM_FRAMES)

    def stills(self) -> LatentClips:
        path = self.folder / "latents" / "stills.safetensors"
        return self._encoded(path, self.recipe.num_stills, seed=2, num_frames=1)

    def clips_at(self, stage: Resolution) -> LatentClips:
        """The same clips, smaller (or shorter)."""
        path = self.folder / "latents" / f"clips-{stage.num_frames}x{stage.size}.safetensors"
        return self._encoded(
            path, self.recipe.num_clips, seed=CLIP_SEED, num_frames=stage.num_frames, size=stage.size
        )

    def _encoded(
        self, path: Path, num_clips: int, *, seed: int, num_frames: int, size: int = shapes.SIZE
    ) -> LatentClips:
        return encode_shapes(
            self.vae(), path, num_clips=num_clips, seed=seed, num_frames=num_frames, size=size,
            quiet=self.quiet,
        )  # fmt: skip

    def scaling_factor(self) -> float:
        """What the model folder's config says: `unit_scale` of the training clips."""
        return unit_scale(self.clips())

    # ---- transformer

    def train_transformer(self) -> None:
        recipe, settings = self.recipe, self.recipe.transformer
        model = JointModel(recipe.config, settings.seed)
        clips, stills, tokenizer = self.clips(), self.stills(), self.tokenizer()
        scale, schedule = unit_scale(clips), NoiseSchedule.from_config(recipe.config.schedule)
        ids = {text: tokenizer([text]).ids[0] for text in _texts()}
        device = self.strategy.device or torch.device("cpu")
        loss_in = partial(_batch_loss, model, schedule, scale, ids, device=device)
        smaller = [(stage.begin, self.clips_at(stage)) for stage in recipe.resolutions]
        if recipe.pack and self.strategy.parallel == "fsdp":
            raise SettingError("frame packs need whole layers: --parallel none or ddp")

        def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
            rng, done = np.random.default_rng([settings.seed, step]), step // settings.accumulation
            loss_of = partial(loss_in, share=Share.of(step, settings.accumulation))
            if done < recipe.still_steps:
                image, figures = loss_of(stills, 3 * recipe.still_batch, rng)
                return image, {"image": float(image.detach())} | figures
            now = next((c for begin, c in reversed(smaller) if done >= begin * settings.steps), clips)
            if recipe.pack:
                draws = [(now, recipe.clip_batch), (stills, recipe.still_batch)]
                return _packed_loss(model, schedule, scale, ids, draws, rng, device=device,
                                    share=Share.of(step, settings.accumulation))  # fmt: skip
            video, figures = loss_of(now, recipe.clip_batch, rng)
            image, more = loss_of(stills, recipe.still_batch, rng)
            means = {"video": float(video.detach()), "image": float(image.detach())}
            return video + 0.5 * image, means | summed(figures, more)

        said = {"clips": recipe.clip_batch, "stills": recipe.still_batch, "scale": scale}
        more = {"resolutions": str(recipe.resolutions)} if recipe.resolutions else {}
        more |= {"pack": True} if recipe.pack else {}
        sample = None
        if recipe.sample_prompt:
            words = self.folder / "tokenizer"
            sample = recipe_sampler(
                recipe.config, self.vae(), words, scale, recipe.sample_prompt, self.strategy
            )
        self._train(model, loss, settings, "transformer", said | more, sample=sample)

    def train_quality(self) -> None:
        """High-quality fine-tuning (paper section 3.1's last stage): the clearest clips alone."""
        recipe, settings = self.recipe, self.recipe.quality
        model = self.joint_model("transformer")
        clips, tokenizer = self.clips(), self.tokenizer()
        scale, schedule = unit_scale(clips), NoiseSchedule.from_config(recipe.config.schedule)
        best = clearest(clips, recipe.quality_share)
        ids = {text: tokenizer([text]).ids[0] for text in _texts()}
        device = self.strategy.device or torch.device("cpu")

        def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
            share, rng = Share.of(step, settings.accumulation), np.random.default_rng([settings.seed, step])
            return _batch_loss(model, schedule, scale, ids, best, recipe.clip_batch, rng, share=share,
                               device=device)  # fmt: skip

        model.requires_grad_(True)
        self._train(model, loss, settings, "quality", {"share": recipe.quality_share, "scale": scale})

    def train_image_to_video(self) -> None:
        """Starts from the trained transformer; see `finetune.trainable`."""
        recipe, settings = self.recipe, self.recipe.image_to_video
        joint, clips = self.joint_model(), self.clips()
        model = trainable(joint.transformer, settings, seed=recipe.image_to_video_train.seed)
        scale = replace(recipe.config.vae, scaling_factor=unit_scale(clips))
        config = replace(recipe.config, vae=scale, transformer=model.config)
        samples = self._samples(joint.text_encoder, clips)
        vae = self.vae()
        vae.config = scale
        train_config = recipe.image_to_video_train
        loss = objective(model, vae, samples, config, settings, seed=train_config.seed,
                         accumulation=train_config.accumulation)  # fmt: skip
        said = {"settings": str(settings), "scale": scale.scaling_factor}
        self._train(model, loss, train_config, "image_to_video", said)

    @torch.no_grad()
    def _samples(self, text_encoder: T5TextEncoder, clips: LatentClips) -> Samples:
        """The latents' clips with their first frames, and all captions' features."""
        tokenizer, texts = self.tokenizer(), sorted({caption.text for caption in clips.captions})
        features = text_encoder(torch.cat([tokenizer([text]).ids for text in ["", *texts]]))
        number = {text: place for place, text in enumerate(texts)}
        scenes = islice(shapes.scenes("train", CLIP_SEED), len(clips))
        return Samples(
            latents=clips.latents,
            features=features[1:],
            caption=torch.tensor([number[caption.text] for caption in clips.captions]),
            unconditional=features[0],
            first_frames=torch.stack([shapes.render(scene, num_frames=1).frames[0] for scene in scenes]),
        )

    def image_to_video_model(self) -> ExpertTransformer | None:
        """With its adapter; None where that stage has not run."""
        path = self.folder / "image_to_video" / "weights.safetensors"
        if not path.exists():
            return None
        model = trainable(self.joint_model().transformer, self.recipe.image_to_video)
        load_into(model, load_tensors(path))
        return model.eval()

    def joint_model(self, stage: str = "") -> JointModel:
        """As the stage left it; by default the last stage that was run."""
        refined = (self.folder / "quality" / "weights.safetensors").exists()
        stage = stage or ("quality" if refined else "transformer")
        model = JointModel(self.recipe.config, 0)
        load_into(model, load_tensors(self.needed(f"{stage}/weights.safetensors", stage)))
        return model.eval()

    def _train(
        self,
        model: nn.Module,
        loss: Objective,
        settings: TrainConfig,
        name: str,
        said: dict[str, Any],
        *,
        kept: nn.Module | None = None,
        sample: Callable[[nn.Module, int], Mapping[str, Video]] | None = None,
    ) -> None:
        """`said`: what else than the settings identifies the run; `kept`: the part that is saved."""
        folder, recipe = self.folder / name, recipe_of(settings, **said)
        train(model, loss, settings, folder, recipe=recipe, quiet=self.quiet, strategy=self.strategy,
              sample=sample)  # fmt: skip
        self._save(kept or model, name)

    def _save(self, model: nn.Module, name: str) -> None:
        state = whole_state(model, self.strategy)
        if self.strategy.is_main:
            save_tensors(state, self.folder / name / "weights.safetensors")

    def needed(self, name: str, stage: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise WeightsError(f"{path} is missing: run the stage {stage!r} first")
        return path


def _texts() -> set[str]:
    """Everything that training may say."""
    return {"", *(c.text for c in shapes.captions()), *(c.image_text for c in shapes.captions())}


def _batch_loss(
    model: JointModel,
    schedule: NoiseSchedule,
    scale: float,
    ids: dict[str, Tensor],
    clips: LatentClips,
    size: int,
    rng: np.random.Generator,
    *,
    share: Share = WHOLE,
    device: torch.device | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Mean loss of `size` random clips (or stills), and figures to log. Timesteps are drawn one from each of
    `size` equal parts of the micro-batch's own interval (paper section 3.2, Explicit Uniform Sampling)."""
    picks = rng.integers(len(clips), size=size)
    x0 = clips.latents[torch.from_numpy(picks)].float() * scale
    still = x0.shape[1] == 1
    texts = [clips.captions[i].image_text if still else clips.captions[i].text for i in picks]
    texts = ["" if rng.random() < TEXT_DROPOUT else text for text in texts]
    steps = share.spread(size, rng, schedule.num_timesteps)
    noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    features = model.text_encoder(torch.stack([ids[text] for text in texts]).to(device))
    timesteps = torch.from_numpy(rng.permutation(steps))
    x0, timesteps, noise = (x.to(device) for x in (x0, timesteps, noise))
    each = diffusion_loss(model.transformer, schedule, x0, features, timesteps, noise)
    tokens = size * num_tokens(x0.shape[1:], features.shape[1], model.transformer.config.patch_size)
    figures = loss_by_timestep(each, timesteps, schedule.num_timesteps)
    return each.mean(), {"samples": size, "tokens": tokens} | figures


def _packed_loss(
    model: JointModel,
    schedule: NoiseSchedule,
    scale: float,
    ids: dict[str, Tensor],
    draws: list[tuple[LatentClips, int]],
    rng: np.random.Generator,
    *,
    share: Share,
    device: torch.device,
) -> tuple[Tensor, dict[str, Any]]:
    """Mean loss of so many random samples of each kind, all in one frame pack (`training.pack`)."""
    x0, texts = [], []
    for clips, size in draws:
        for i in rng.integers(len(clips), size=size):
            x0.append(clips.latents[int(i)].float() * scale)
            said = clips.captions[i].image_text if len(x0[-1]) == 1 else clips.captions[i].text
            texts.append("" if rng.random() < TEXT_DROPOUT else said)
    steps = torch.from_numpy(rng.permutation(share.spread(len(x0), rng, schedule.num_timesteps)))
    noise = [torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(device) for x in x0]
    features = model.text_encoder(torch.stack([ids[text] for text in texts]).to(device))
    each = packed_loss(model.transformer, schedule, [x.to(device) for x in x0], list(features),
                       steps.to(device), noise)  # fmt: skip
    patch = model.transformer.config.patch_size
    tokens = sum(num_tokens(x.shape, features.shape[1], patch) for x in x0)
    figures = loss_by_timestep(each, steps, schedule.num_timesteps)
    return each.mean(), {"samples": len(x0), "tokens": tokens} | figures
