"""Continuing from a trained transformer: all weights or an adapter, for text or for image to video.

The VAE and the text encoder stay as they are, so clips enter as latents and captions as features.

Legend: N clips, B batch, T latent frames, C latent channels, H/W latent rows/columns, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideox_diff import conditioning, lora
from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.schedule import NoiseSchedule
from cogvideox_diff.training.objective import diffusion_loss, loss_by_timestep
from cogvideox_diff.training.pack import num_tokens, packed_loss
from cogvideox_diff.training.timesteps import Share
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE, scale_image_latents
from shared.clips.stream import ClipStream, stacked
from shared.errors import SettingError
from shared.training import Objective
from shared.transforms import to_signed

Method = Literal["lora", "full"]
FinetuneTask = Literal["t2v", "i2v"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What is trained, and on what. Defaults: the released trainers'.

    Images are given with Gaussian noise of sigma exp(Normal(`image_noise`)), so that the model does not rely
    on their last bits (SAT's `noised_image_input`)."""

    task: FinetuneTask = "t2v"
    method: Method = "lora"
    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = lora.TARGETS
    batch: int = 1
    text_dropout: float = 0.1
    image_dropout: float = 0.05  # of a whole batch
    image_noise: tuple[float, float] = (-3.0, 0.5)  # mean and deviation of log sigma

    def __post_init__(self) -> None:
        if self.method not in get_args(Method) or self.task not in get_args(FinetuneTask):
            raise SettingError(
                f"method must be lora or full and task t2v or i2v, got {self.method!r}, {self.task!r}"
            )
        if self.batch < 1:
            raise SettingError(f"batch must be at least 1, got {self.batch}")
        for name in ("text_dropout", "image_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The clips of a micro-batch: posterior means in the VAE's own scale, and captions as text features."""

    latents: Tensor  # [B, T, C, H, W]
    features: Tensor  # [B, L, D]
    deviations: Tensor | None = (
        None  # [B, T, C, H, W]; with them every step draws its own sample, as SAT does
    )
    first_frames: Tensor | None = None  # uint8 [B, height, width, 3]: what image to video conditions on

    def drawn(self, rng: np.random.Generator) -> Tensor:
        """Latents, float32 and not scaled."""
        mean = self.latents.float()
        if self.deviations is None:
            return mean
        return mean + self.deviations.float() * _normal(rng, mean.shape)


class Source(Protocol):
    """Where batches come from; `unconditional` [L, D] stands for no caption."""

    @property
    def unconditional(self) -> Tensor: ...

    def batch(self, step: int, size: int, rng: np.random.Generator) -> Batch:
        """`size` clips (or fewer) of one size; a function of the step, or of what `rng` draws."""
        ...


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Clips of one size in memory, of which every batch draws any."""

    latents: Tensor  # [N, T, C, H, W]
    features: Tensor  # [K, L, D] of the different captions
    caption: Tensor  # int64 [N]: which of them a clip has
    unconditional: Tensor  # [L, D]
    first_frames: Tensor | None = None  # uint8 [N, height, width, 3]
    deviations: Tensor | None = None  # [N, T, C, H, W]

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, step: int, size: int, rng: np.random.Generator) -> Batch:
        picks = torch.from_numpy(rng.integers(len(self), size=size))
        return Batch(
            latents=self.latents[picks],
            features=self.features[self.caption[picks]],
            deviations=None if self.deviations is None else self.deviations[picks],
            first_frames=None if self.first_frames is None else self.first_frames[picks],
        )


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Clips that are read when their turn comes, by worker processes ahead of it: the stream's samples have
    "latents", "deviation", "features" and "first_frame"."""

    stream: ClipStream
    unconditional: Tensor

    def batch(self, step: int, size: int, rng: np.random.Generator) -> Batch:
        """As many as the stream's plan says."""
        return _batch_of(self.stream.at(step))

    def pack(self, step: int) -> list[Batch]:
        """The samples of a pack, a batch each."""
        return [_batch_of(stacked([sample])) for _, sample in self.stream.rows_at(step)]


def _batch_of(tensors: Mapping[str, Tensor]) -> Batch:
    return Batch(
        latents=tensors["latents"],
        features=tensors["features"],
        deviations=tensors["deviation"],
        first_frames=tensors["first_frame"],
    )


def trainable(model: ExpertTransformer, settings: FinetuneConfig, *, seed: int = 0) -> ExpertTransformer:
    """The model made ready: parameters to train ask for gradients, others do not. For image to video a model
    that has only read text is widened first, and its patch embedding is trained in full."""
    net = model.config
    widened = settings.task == "i2v" and net.in_channels == net.out_channels
    if widened:
        model = widen_for_images(model)
    if settings.method == "full":
        return model.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    lora.inject(model, settings.rank, settings.alpha, settings.targets, generator=generator)
    if widened:
        model.patch_embed.requires_grad_(True)
    return model


def widen_for_images(model: ExpertTransformer) -> ExpertTransformer:
    """A copy that also reads image latents, behind the noisy ones; with weights of zero for them, it gives
    what the model gives."""
    net = model.config
    with torch.device("meta"):
        wide = ExpertTransformer(replace(net, in_channels=2 * net.out_channels))
    tensors = dict(model.state_dict())
    name = "patch_embed.proj.weight"
    kernel = tensors[name].unflatten(1, (net.in_channels, -1))  # both layouts have channels first
    kernel = torch.cat([kernel, torch.zeros_like(kernel)], dim=1)
    tensors[name] = kernel.reshape(wide.get_parameter(name).shape)
    wide.load_state_dict({key: x.clone() for key, x in tensors.items()}, assign=True)
    return wide


def objective(
    model: ExpertTransformer,
    vae: CausalVAE,
    samples: Source,
    config: CogVideoXConfig,
    settings: FinetuneConfig,
    *,
    seed: int,
    accumulation: int = 1,
) -> Objective:
    """What `shared.training.train` minimises: the mean loss of `batch` clips, one timestep from each of as
    many equal parts of the micro-batch's own interval (paper section 3.2, Explicit Uniform Sampling)."""
    schedule = NoiseSchedule.from_config(config.schedule)
    if settings.task == "i2v" and isinstance(samples, Samples) and samples.first_frames is None:
        raise SettingError("image to video needs the clips' first frames")

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        rng = np.random.default_rng([seed, step])
        batch = samples.batch(step, settings.batch, rng)
        x0, size = conditioning.clean_latents(batch.drawn(rng), config), len(batch.latents)
        dropped = torch.from_numpy(rng.random(size) < settings.text_dropout)
        text = torch.where(dropped[:, None, None], samples.unconditional, batch.features)
        steps = Share.of(step, accumulation).spread(size, rng, schedule.num_timesteps)
        timesteps = torch.from_numpy(rng.permutation(steps))
        noise = _normal(rng, x0.shape)
        device = next(model.parameters()).device
        image = None
        if settings.task == "i2v":
            image = _noised_images(vae, batch, x0.shape[1], settings, rng).to(device)
        ofs = config.sampling.ofs if config.transformer.ofs_embed_dim else None
        each = diffusion_loss(
            model, schedule, *(x.to(device) for x in (x0, text, timesteps, noise)), image_latents_BTCHW=image,
            ofs=None if ofs is None else torch.full((size,), float(ofs), device=device),
            dtype=model.proj_out.weight.dtype,
        )  # fmt: skip
        tokens = size * num_tokens(x0.shape[1:], text.shape[1], config.transformer.patch_size)
        figures = loss_by_timestep(each, timesteps, schedule.num_timesteps)
        return each.mean(), {"samples": size, "tokens": tokens} | figures

    return loss


def packed_objective(
    model: ExpertTransformer,
    samples: Streamed,
    config: CogVideoXConfig,
    settings: FinetuneConfig,
    *,
    seed: int,
    accumulation: int = 1,
) -> Objective:
    """As `objective`, for text to video: a micro-batch is a pack of the stream's plan (`pack.PackPlan`), and
    every sample of it counts alike. `settings.batch` is not used."""
    if settings.task != "t2v":
        raise SettingError(f"frame packs are for text to video (t2v), got task {settings.task!r}")
    schedule, net = NoiseSchedule.from_config(config.schedule), config.transformer

    def loss(step: int) -> tuple[Tensor, dict[str, Any]]:
        rng, device = np.random.default_rng([seed, step]), next(model.parameters()).device
        pack = samples.pack(step)
        x0 = [conditioning.clean_latents(one.drawn(rng), config)[0].to(device) for one in pack]
        noise = [_normal(rng, x.shape).to(device) for x in x0]
        silent = [rng.random() < settings.text_dropout for _ in pack]
        texts = [
            samples.unconditional if no else one.features[0] for no, one in zip(silent, pack, strict=True)
        ]
        steps = Share.of(step, accumulation).spread(len(pack), rng, schedule.num_timesteps)
        timesteps = torch.from_numpy(rng.permutation(steps)).to(device)
        ofs = config.sampling.ofs if net.ofs_embed_dim else None
        each = packed_loss(
            model, schedule, x0, [text.to(device) for text in texts], timesteps, noise,
            ofs=None if ofs is None else torch.full((len(pack),), float(ofs), device=device),
        )  # fmt: skip
        tokens = sum(num_tokens(one.latents.shape[1:], net.text_len, net.patch_size) for one in pack)
        figures = loss_by_timestep(each, timesteps, schedule.num_timesteps)
        return each.mean(), {"samples": len(pack), "tokens": tokens} | figures

    return loss


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


@torch.no_grad()
def _noised_images(
    vae: CausalVAE,
    batch: Batch,
    frames: int,
    settings: FinetuneConfig,
    rng: np.random.Generator,
) -> Tensor:
    """Scaled latents of the clips' first frames, then zeros [B, T, C, H, W]."""
    assert batch.first_frames is not None
    size = len(batch.first_frames)
    pixels = to_signed(batch.first_frames.permute(0, 3, 1, 2))[:, :, None]  # [B, 3, 1, h, w]
    mean, deviation = settings.image_noise
    sigma = np.exp(rng.normal(mean, deviation, size=(size, 1, 1, 1, 1)))
    grain = sigma * rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels = pixels + torch.from_numpy(grain).float()
    shape = (size, 1, *batch.latents.shape[2:])
    posterior_noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    z = conditioning.encode(vae, pixels.to(next(vae.parameters())), posterior_noise)
    if rng.random() < settings.image_dropout:
        z = torch.zeros_like(z)
    return F.pad(scale_image_latents(z, vae.config), (0, 0, 0, 0, 0, 0, 0, frames - 1))
