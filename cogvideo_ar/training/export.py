"""From the folders of a finished training run to a model folder with its card."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from cogvideo_ar.config import TransformerConfig
from cogvideo_ar.parts import Parts
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideo_ar.training.recipes import Run
from cogvideo_ar.transformer import CogVideoTransformer
from shared.checkpoints import load_into
from shared.files import atomic_path
from shared.model_card import model_card, read_stage

TRAINED = ("vqvae", "base", "keyframes", "interpolation")
SUMMARY = """CogVideo (2022) at toy size, for the world of `shared.clips.shapes`: 64 x 64 pixels, 17 frames at
8 per second, one coloured shape that moves over a plain background. The architecture is the released one
(image codec, dual-channel transformer, key frames, recursive interpolation); sizes and data differ."""


def export(run: Run, folder: Path, results: Path | None = None) -> Path:
    """Write the model folder (float16) and its MODEL_CARD.md; `results` is a benchmark's results.json that
    has measured an earlier export of the same run."""
    parts = load_parts(run)
    CogVideoPipeline(parts).save_pretrained(folder, dtype=torch.float16)
    measured = json.loads(results.read_text(encoding="utf-8"))["models"] if results else {}
    card = model_card(
        "CogVideo demo weights",
        SUMMARY,
        command="cogvideo-ar train --preset demo --stage all --output_path runs/ar",
        stages=[read_stage(run.folder / name) for name in TRAINED],
        parameters={
            "image codec": _count(parts.vqvae.parameters()),
            "base channel": _count(p for _, p in parts.keyframes.base_parameters()),
            "temporal channel, key frames": _count(p for _, p in parts.keyframes.temporal_parameters()),
            "temporal channel, interpolation": _count(
                p for _, p in parts.interpolation.temporal_parameters()
            ),
        },
        results=measured.get("cogvideo-demo"),
    )
    with atomic_path(folder / "MODEL_CARD.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    return folder


def load_parts(run: Run) -> Parts:
    """The trained nets of a run, with the averaged weights."""
    config = run.recipe.config
    return Parts(
        config=config,
        keyframes=_transformer(run, config.keyframes, "keyframes"),
        interpolation=_transformer(run, config.interpolation, "interpolation"),
        vqvae=run.vqvae(),
        tokenizer=run.tokenizer(),
        text_model=(run.folder / "ice_text.model").read_bytes(),
    )


def _transformer(run: Run, config: TransformerConfig, name: str) -> CogVideoTransformer:
    model = CogVideoTransformer(config)
    load_into(model, run.trained(name))
    return model.eval()


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
