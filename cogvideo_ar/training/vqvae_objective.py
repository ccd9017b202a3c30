"""What the image codec is trained on: reconstruction and commitment, and the moving averages of its codebook.

The released icetk code has no training script; this is the usual rule of van den Oord et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo_ar.vqvae import VQVAE, VQVAEOutput

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, target), each [B, 3, H, W] in -1..1, -> a scalar distance."""


@dataclass(frozen=True, kw_only=True)
class VQVAELossWeights:
    """Weights of the terms; pixel terms are means over -1..1 pixels, summed over the rates. The commitment
    comes from the model, which has its own factor (`VQVAEConfig.commitment_cost`)."""

    l1: float = 1.0
    mse: float = 1.0
    commitment: float = 1.0
    perceptual: float = 1.0  # only if a distance is given


DEFAULT_WEIGHTS = VQVAELossWeights()


def vqvae_loss(
    model: VQVAE,
    pixels: Tensor,
    *,
    weights: VQVAELossWeights = DEFAULT_WEIGHTS,
    perceptual: Perceptual | None = None,
    pixel_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of images [B, 3, H, W] in -1..1, and its parts as detached scalars; the model stays as it is."""
    return output_loss(
        model(pixels), pixels, weights=weights, perceptual=perceptual, pixel_weight=pixel_weight
    )


def vqvae_step(
    model: VQVAE,
    pixels: Tensor,
    *,
    generator: torch.Generator | None,
    decay: float = 0.99,
    dead_below: float = 0.1,
    weights: VQVAELossWeights = DEFAULT_WEIGHTS,
    perceptual: Perceptual | None = None,
    pixel_weight: Tensor | None = None,
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
    weights: VQVAELossWeights = DEFAULT_WEIGHTS,
    perceptual: Perceptual | None = None,
    pixel_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a forward that has already run."""
    loss, logs = reconstruction_loss(
        output.reconstructions, pixels, weights=weights, perceptual=perceptual, pixel_weight=pixel_weight
    )
    logs |= {"commitment": output.commitment_loss.detach(), "used_codes": _used_codes(output)}
    return loss + weights.commitment * output.commitment_loss, logs


def reconstruction_loss(
    reconstructions: Mapping[int, Tensor],
    pixels: Tensor,
    *,
    weights: VQVAELossWeights = DEFAULT_WEIGHTS,
    perceptual: Perceptual | None = None,
    pixel_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of the loss that needs no codebook. A reconstruction smaller than the image (whose size was no
    multiple of the rate) is compared with the image's top left part, which is what was coded. `pixel_weight`
    [B, 1, H, W] weighs the differences in `l1` and `mse`."""
    terms: dict[str, list[Tensor]] = {"l1": [], "mse": []} | ({"perceptual": []} if perceptual else {})
    psnr = []
    for x in reconstructions.values():
        target = _like(pixels, x)
        weight = 1.0 if pixel_weight is None else _like(pixel_weight, x)
        difference = x - target
        terms["l1"].append((weight * difference.abs()).mean())
        terms["mse"].append((weight * difference.square()).mean())
        if perceptual is not None:
            terms["perceptual"].append(perceptual(x, target))
        psnr.append(_psnr(x.detach(), target))
    sums = {name: torch.stack(values).sum() for name, values in terms.items()}
    loss = torch.stack([getattr(weights, name) * value for name, value in sums.items()]).sum()
    return loss, {name: value.detach() for name, value in sums.items()} | {"psnr": torch.stack(psnr).mean()}


def _like(x: Tensor, reconstruction: Tensor) -> Tensor:
    return x[..., : reconstruction.shape[-2], : reconstruction.shape[-1]]


def _psnr(x: Tensor, target: Tensor) -> Tensor:
    """Decibels over clamped pixels, whose range is 2 wide."""
    return 10 * torch.log10(4 / F.mse_loss(x.clamp(-1, 1), target).clamp(min=1e-10))


def _used_codes(output: VQVAEOutput) -> Tensor:
    """How many different codes the batch uses, over all rates."""
    codes = torch.cat([codes.flatten() for codes in output.codes.values()])
    return torch.tensor(float(codes.unique().numel()))
