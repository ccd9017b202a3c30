"""What the 3D causal VAE learns from: L1, a perceptual distance, KL and, later, a 3D discriminator.

CogVideoX paper section 2.1; the loss of VQGAN (Esser et al. 2020, arXiv 2012.09841) with its adaptive weight.
The release has neither weights nor start steps of this training, so they are settings. Generator and
discriminator are updated in the same step: each one's loss gives the other no gradient.

Legend: B clips, C channels, T frames, H/W rows/columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cogvideox_diff.training.perceptual import Perceptual, load_perceptual
from cogvideox_diff.vae.autoencoder import CausalVAE, Posterior
from shared.errors import SettingError

GanLoss = Literal["hinge", "non_saturating"]
MOST_WEIGHT = 1e4
MOST_WIDTH = 512
SLOPE = 0.1


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """Weights of the terms beside L1; all 0 by default, which leaves a recipe's own loss in place."""

    perceptual: float = 0.0
    perceptual_net: str = ""  # a file; "": fixed-seed features
    adversarial: float = 0.0  # beside the adaptive weight
    start: int = 0  # step from which the discriminator is trained and heard
    loss: GanLoss = "hinge"
    kl: float = 1e-6
    width: int = 16
    depth: int = 4  # halvings; of them as many in time as the clip's frames allow

    def __post_init__(self) -> None:
        if self.loss not in get_args(GanLoss):
            raise SettingError(f"loss must be one of {', '.join(get_args(GanLoss))}, got {self.loss!r}")
        for name in ("perceptual", "adversarial", "start", "kl"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.width < 1 or self.depth < 1:
            raise SettingError(f"width and depth must be at least 1, got {self.width} and {self.depth}")

    @property
    def active(self) -> bool:
        return self.perceptual > 0 or self.adversarial > 0


# ---- discriminator


class Halving(nn.Module):
    """Two convolutions, then 2x2 (or, in time too, 2x2x2) places into channels, beside a strided shortcut."""

    def __init__(self, inputs: int, width: int, *, in_time: bool) -> None:
        super().__init__()
        self.step = (2 if in_time else 1, 2, 2)
        kernel = (3 if in_time else 1, 3, 3)
        padding = (kernel[0] // 2, 1, 1)
        self.conv1 = nn.Conv3d(inputs, width, kernel, padding=padding)
        self.conv2 = nn.Conv3d(width, width, kernel, padding=padding)
        self.gather = nn.Conv3d(width * self.step[0] * 4, width, 1)
        self.shortcut = nn.Conv3d(inputs, width, 1, stride=self.step)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        t, h, w = self.step
        if x_BCTHW.shape[2] % t:  # 4k+1 frames: the first one twice, as an image is a clip that stands still
            x_BCTHW = torch.cat([x_BCTHW[:, :, :1], x_BCTHW], dim=2)
        y = F.leaky_relu(self.conv1(x_BCTHW), SLOPE)
        y = F.leaky_relu(self.conv2(y), SLOPE)
        y = y.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # B C T t H h W w
        y = y.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # B (C t h w) T H W
        return (self.gather(y) + self.shortcut(x_BCTHW)) / 2**0.5


class Discriminator3D(nn.Module):
    """Pixels [B, 3, T, H, W], H and W multiples of 2**depth -> logits [B, t] of the frames that are left:
    high for true clips. Halves time for as long as there is any, then each frame alone."""

    def __init__(self, config: GanConfig, time_levels: int = 2) -> None:
        super().__init__()
        widths = [min(config.width * 2**i, MOST_WIDTH) for i in range(config.depth)]
        inputs = [3, *widths[:-1]]
        self.levels = nn.ModuleList(
            Halving(a, b, in_time=i < time_levels)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.conv_out = nn.Conv3d(widths[-1], widths[-1], (1, 3, 3), padding=(0, 1, 1))
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, pixels_BCTHW: Tensor) -> Tensor:
        x = pixels_BCTHW
        for level in self.levels:
            x = level(x)
        x = F.leaky_relu(self.conv_out(x), SLOPE).mean((3, 4))  # B C t
        return self.logit(x.transpose(1, 2)).squeeze(-1)


# ---- losses


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss = "hinge") -> Tensor:
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: GanLoss = "hinge") -> Tensor:
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """What makes both losses pull equally at the decoder's last layer; a number, no part of the graph."""
    pulls = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
    return (pulls[0] / (pulls[1] + 1e-4)).clamp(0, MOST_WEIGHT).detach()


class AdversarialVAE(nn.Module):
    """The VAE with what judges it; `vae` is what is kept. The perceptual net is no part of the state."""

    def __init__(self, vae: CausalVAE, config: GanConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        self.discriminator = Discriminator3D(config) if config.adversarial else nn.Identity()
        self._judge: tuple[Perceptual, ...] = (load_perceptual(config.perceptual_net),)  # not a submodule

    def loss(
        self, pixels: Tensor, decoded: Tensor, posterior: Posterior, step: int, frame: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of both nets at a step, and its parts; clips [B, 3, T, H, W], `frame` the one that the
        perceptual distance looks at (as upstream, one per clip)."""
        config = self.config
        l1 = (decoded.float() - pixels).abs().mean()
        judge = self._judge[0].to(pixels.device)
        perceptual = (
            judge(decoded[:, :, frame], pixels[:, :, frame]).mean() if config.perceptual else l1.new_zeros(())
        )
        reconstruction = l1 + config.perceptual * perceptual
        kl = posterior.kl() / posterior.mean[0].numel()
        total = reconstruction + config.kl * kl
        parts = {"l1": l1, "perceptual": perceptual, "kl": kl}
        if config.adversarial and step >= config.start:
            more, told = self._adversarial(pixels, decoded, reconstruction)
            total, parts = total + more, parts | told
        return total, {name: float(x.detach()) for name, x in parts.items()}

    def _adversarial(
        self, pixels: Tensor, decoded: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, net = self.config, self.discriminator
        frozen = {name: p.detach() for name, p in net.named_parameters()}
        generator = generator_loss(functional_call(net, frozen, (decoded,)), config.loss)
        weight = adaptive_weight(reconstruction, generator, self.last_layer)
        real, fake = net(pixels), net(decoded.detach())
        judged = discriminator_loss(real, fake, config.loss)
        told = {"generator": generator, "discriminator": judged, "adaptive_weight": weight,
                "logit_gap": real.mean() - fake.mean()}  # fmt: skip
        return config.adversarial * weight * generator + judged, told

    @property
    def last_layer(self) -> Tensor:
        return self.vae.decoder.conv_out.conv.weight
