"""What the image codec is trained on: reconstruction and commitment, and the moving averages of its codebook.

The released icetk code has no training script; this is the usual rule of van den Oord et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_ar.vqvae import VQVAE, VQVAEOutput

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, target), each [B, 3, H, W] in -1..1, -> a scalar distance."""


@dataclass(frozen=True, kw_only=True)
class VQVAELossWeights:
    """Weights of the terms; pixel terms are means over -1..1 pixels, summed over the rates."""

    l1: float = 1.0
    mse: float = 1.0
    commitment: float = 0.25
    perceptual: float = 1.0  # only if a distance is given


def vqvae_loss(
    model: VQVAE,
    pixels: Tensor,
    *,
    weights: VQVAELossWeights | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of images [B, 3, H, W] in -1..1, and its parts as detached scalars; the model stays as it is."""
    return output_loss(model(pixels), pixels, weights=weights, perceptual=perceptual)


def vqvae_step(
    model: VQVAE,
    pixels: Tensor,
    *,
    generator: torch.Generator,
    decay: float = 0.99,
    dead_below: float = 0.1,
    weights: VQVAELossWeights | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`vqvae_loss`, then one moving-average step of the codebook; call backward on the loss as usual.

    Codes whose average use is under `dead_below` of the mean start again at positions drawn by the CPU
    `generator`. `model.init_codebook(pixels, generator)` beforehand saves many steps."""
    output = model(pixels)
    loss, logs = output_loss(output, pixels, weights=weights, perceptual=perceptual)
    restarted = 0
    if model.config.codebook_update == "ema":
        restarted = model.ema_update(output, decay=decay, dead_below=dead_below, generator=generator)
    return loss, logs | {"restarted_codes": torch.tensor(float(restarted))}


def output_loss(
    output: VQVAEOutput,
    pixels: Tensor,
    *,
    weights: VQVAELossWeights | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a forward that has already run. A reconstruction smaller than the image (whose size was no
    multiple of the rate) is compared with the image's top left part, which is what was coded."""
    weights = weights or VQVAELossWeights()
    terms = {"l1": F.l1_loss, "mse": F.mse_loss} | ({"perceptual": perceptual} if perceptual else {})
    targets = {r: pixels[..., : x.shape[-2], : x.shape[-1]] for r, x in output.reconstructions.items()}
    logs = {
        name: torch.stack([term(x, targets[rate]) for rate, x in output.reconstructions.items()]).sum()
        for name, term in terms.items()
    }
    logs["commitment"] = output.commitment_loss
    loss = torch.stack([getattr(weights, name) * value for name, value in logs.items()]).sum()
    logs = {name: value.detach() for name, value in logs.items()}
    return loss, logs | {"psnr": _psnr(output, targets), "used_codes": _used_codes(output)}


def _psnr(output: VQVAEOutput, targets: dict[int, Tensor]) -> Tensor:
    """Decibels over clamped pixels, whose range is 2 wide; mean over the rates."""
    errors = [F.mse_loss(x.detach().clamp(-1, 1), targets[r]) for r, x in output.reconstructions.items()]
    return torch.stack([10 * torch.log10(4 / error.clamp(min=1e-10)) for error in errors]).mean()


def _used_codes(output: VQVAEOutput) -> Tensor:
    """How many different codes the batch uses, over all rates."""
    codes = torch.cat([codes.flatten() for codes in output.codes.values()])
    return torch.tensor(float(codes.unique().numel()))
