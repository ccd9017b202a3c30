"""CLIP from a folder that transformers reads; nothing is downloaded.

Images are prepared here, with PIL, as CLIP's own code does: transformers' processors would need torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.metrics.clip_scores import scores
from shared.errors import WeightsError
from shared.runtime import parse_device
from shared.video import Video

BATCH = 32  # frames that pass together


class ClipScorer:
    """CLIPSIM and temporal consistency of videos. WeightsError for a folder that is no CLIP."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer  # seconds to import

        self.device = parse_device("auto")
        try:
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self.model = model.eval().to(self.device)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self.size, self.mean, self.std = image_settings(folder)
            self.text_len = self.model.text_model.embeddings.position_embedding.num_embeddings
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise WeightsError(f"{folder} is no CLIP folder: {reason}") from error

    def measure(self, video: Video, prompt: str) -> dict[str, float]:
        """Values of one video by metric name."""
        return scores(self.embed_frames(video), self.embed_text(prompt))

    @torch.no_grad()
    def embed_frames(self, video: Video) -> Tensor:
        """[T, D] on the CPU."""
        pixels_TCHW = self.prepared(video)
        found = []
        for part in pixels_TCHW.split(BATCH):
            pooled = self.model.vision_model(pixel_values=part.to(self.device)).pooler_output
            found.append(self.model.visual_projection(pooled).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def embed_text(self, prompt: str) -> Tensor:
        """[D] on the CPU."""
        tokens = self.tokenizer([prompt], truncation=True, max_length=self.text_len, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"].to(self.device),
            attention_mask=tokens["attention_mask"].to(self.device),
        ).pooler_output
        return self.model.text_projection(pooled)[0].cpu()

    def prepared(self, video: Video) -> Tensor:
        """float32 [T, 3, size, size]: shorter side to `size` bicubically, middle, mean and deviation."""
        squares = np.stack([_square(frame.numpy(), self.size) for frame in video.frames])
        pixels = (torch.from_numpy(squares).float() / 255 - self.mean) / self.std
        return pixels.permute(0, 3, 1, 2).contiguous()  # [T, H, W, C] -> [T, C, H, W]


def image_settings(folder: Path) -> tuple[int, Tensor, Tensor]:
    """(side, mean, deviation) of `preprocessor_config.json` (or its part of `processor_config.json`)."""
    path = folder / "preprocessor_config.json"
    said: dict[str, Any]
    if path.is_file():
        said = json.loads(path.read_text(encoding="utf-8"))
    else:
        said = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    size = said["crop_size"]
    side = int(size["height"] if isinstance(size, dict) else size)
    return side, torch.tensor(said["image_mean"]), torch.tensor(said["image_std"])


def _square(frame_HWC: np.ndarray, side: int) -> np.ndarray:
    height, width = frame_HWC.shape[:2]
    short = min(height, width)
    size = (side * width // short, side * height // short)  # (width, height), as PIL has it
    picture = Image.fromarray(frame_HWC).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))
