"""How different two pictures look: distances between features of a fixed network instead of between pixels.

As LPIPS (Zhang et al. 2018, arXiv 1801.03924): features of several layers, each place's made a
unit vector, the squared differences averaged. The network is a file that the user has, or one of random
weights drawn from a fixed seed, which needs no file: it knows edges and colours, but nothing of the world.

Legend: B pictures, C channels, H/W rows/columns; pixels are in -1..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checkpoints import load_tensors
from shared.errors import WeightsError

VGG16 = (
    (0, 2),
    (5, 7),
    (10, 12, 14),
    (17, 19, 21),
    (24, 26, 28),
)  # convolutions of each level in torchvision
# Mean and deviation of ImageNet's colours for pixels in -1..1, as LPIPS spells them
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SEED = 20240812


class FeatureLevels(nn.Module):
    """Convolutions 3x3 with ReLU, halved between levels: [B, 3, H, W] -> a feature map per level."""

    def __init__(self, widths: Sequence[Sequence[int]]) -> None:
        super().__init__()
        inputs, levels = 3, []
        for level in widths:
            layers = []
            for width in level:
                layers.append(nn.Conv2d(inputs, width, 3, padding=1))
                inputs = width
            levels.append(nn.ModuleList(layers))
        self.levels = nn.ModuleList(levels)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        found = []
        for number, level in enumerate(self.levels):
            x_BCHW = F.max_pool2d(x_BCHW, 2) if number else x_BCHW
            for layer in level:  # type: ignore[attr-defined]
                x_BCHW = F.relu(layer(x_BCHW))
            found.append(x_BCHW)
        return found


class Perceptual(nn.Module):
    """Distance [B] of pictures [B, 3, H, W]; frozen. `weights`: LPIPS's per channel, if there are any."""

    def __init__(self, net: nn.Module, name: str, weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.net, self.name = net.eval(), name
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight{i}", weight.flatten())
        self.num_weights = len(weights)
        self.requires_grad_(False)

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        shift, scale = (torch.tensor(v, device=x_BCHW.device)[:, None, None] for v in (SHIFT, SCALE))
        both = self.net((torch.cat([x_BCHW, y_BCHW]).float() - shift) / scale)
        levels = [both] if isinstance(both, Tensor) else list(both)
        return sum((self._distance(i, level) for i, level in enumerate(levels)), torch.zeros(()))

    def _distance(self, i: int, features: Tensor) -> Tensor:
        x, y = F.normalize(features.float(), dim=1, eps=1e-8).chunk(2)
        squares = (x - y).square()
        if self.num_weights:
            squares = squares * getattr(self, f"weight{i}")[:, None, None]
        return squares.sum(1).mean((1, 2))


def fixed_seed_features(seed: int = SEED) -> Perceptual:
    """The default: three levels of random weights, the same on every machine."""
    net, generator = FeatureLevels(((16, 16), (32, 32), (64, 64))), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                deviation = (2 / layer.weight[0].numel()) ** 0.5
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * deviation)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return Perceptual(net, "fixed-seed features")


def load_perceptual(path: str | Path) -> Perceptual:
    """`""`: the default. A `.safetensors` of torchvision's VGG16 (`features.N.weight`, with LPIPS's
    `linK.model.1.weight` if they are there), or a TorchScript file of a net from normalised pixels to one
    feature map or a list of them. WeightsError for anything else."""
    if not str(path):
        return fixed_seed_features()
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path} for the perceptual loss")
    if path.suffix == ".safetensors":
        return _vgg(path)
    try:
        return Perceptual(torch.jit.load(path, map_location="cpu"), path.name)
    except RuntimeError as error:
        raise WeightsError(f"{path} is neither safetensors nor TorchScript") from error


def _vgg(path: Path) -> Perceptual:
    tensors = load_tensors(path)
    try:
        levels = [[tensors[f"features.{i}.weight"] for i in level] for level in VGG16]
        net = FeatureLevels([[len(weight) for weight in level] for level in levels])
        state = {
            f"levels.{n}.{m}.{part}": tensors[f"features.{i}.{part}"].float()
            for n, level in enumerate(VGG16)
            for m, i in enumerate(level)
            for part in ("weight", "bias")
        }
        net.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{path} does not hold VGG16's convolutions: {error}") from error
    names = [f"lin{k}.model.1.weight" for k in range(len(VGG16))]
    weights = [tensors[name].float() for name in names if name in tensors]
    return Perceptual(net, path.name, weights if len(weights) == len(VGG16) else ())
