"""Small random nets in the forms that the user's files have, and sets of videos for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.video import Video

NUM_FEATURES = 6


class SmallI3D(nn.Module):
    """The interface of StyleGAN-V's I3D: resizing and scaling on request, [B, 3, T, 224, 224] to [B, D].

    In float64, so that a computation in NumPy can be compared to the last digits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3 * 2 * 4 * 4, NUM_FEATURES, generator=random).double())

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        x = x.to(self.weight.dtype)
        if resize:
            x = F.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        if rescale:
            x = 2.0 * x / 255.0 - 1.0
        half = x.shape[2] // 2
        halves = torch.stack([x[:, :, :half].mean(2), x[:, :, half:].mean(2)], 2)  # [B, 3, 2, H, W]
        cells = halves.unflatten(3, [4, 56]).unflatten(5, [4, 56]).mean(dim=[4, 6])  # [B, 3, 2, 4, 4]
        features = torch.tanh(cells.flatten(1) @ self.weight)
        return features if return_features else features.softmax(1)


class SmallLogits(SmallI3D):
    """The interface of the Kinetics-400 I3D once scripted: pixels in -1..1 and nothing else."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        half = x.shape[2] // 2
        halves = torch.stack([x[:, :, :half].mean(2), x[:, :, half:].mean(2)], 2)
        cells = halves.unflatten(3, [4, 56]).unflatten(5, [4, 56]).mean(dim=[4, 6])
        return torch.tanh(cells.flatten(1) @ self.weight)


class SmallC3D(nn.Module):
    """uint8 [B, 3, 16, H, W] -> probabilities of five classes."""

    def forward(self, x: Tensor) -> Tensor:
        means = x.double().mean(dim=[2, 3, 4]) / 32
        return torch.cat([means, means[:, :2] * 0.5], 1).softmax(1)


def script(net: nn.Module, path: Path) -> Path:
    torch.jit.script(net.eval()).save(str(path))
    return path


def noise_videos(
    count: int, seed: int, *, frames: int = 18, height: int = 20, width: int = 30, level: int = 0
) -> list[Video]:
    """Smooth random videos, `level` brighter."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        coarse = torch.randn(1, 3, 4, 4, 4, generator=random) * 40 + 110 + level
        smooth = F.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0]
        pixels = smooth.round().clamp(0, 255).byte().permute(1, 2, 3, 0)
        made.append(Video(frames=pixels.contiguous(), fps=8.0))
    return made


def clip_folder(folder: Path) -> Path:
    """A random CLIP of one layer with a character tokenizer, as transformers writes it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    characters = "abcdefghijklmnopqrstuvwxyz "
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    image = {
        "crop_size": {"height": 16, "width": 16},
        "size": {"shortest_edge": 16},
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **small, vocab_size=len(words), max_position_embeddings=12, bos_token_id=0, eos_token_id=1
    )
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    torch.manual_seed(3)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return folder
